#include "sliced_product.h"

#include <algorithm>

namespace {

constexpr int64_t kSliceBytes = 1 << 20;
constexpr int64_t kMostRows = 8;
constexpr size_t kAlignment = 64;

// ggml's public ggml_type_traits_cpu (ggml-cpu.h).
struct TypeTraits {
    void (*from_float)(const float* from, void* to, int64_t count);
    void (*dot)(int count, float* result, size_t, const void* weights, size_t, const void* row, size_t, int num_rows);
    int32_t dot_type;
    int64_t num_rows;
};

const TypeTraits* traits_of(const ProductFunctions& ggml, int32_t type) {
    return reinterpret_cast<const TypeTraits* (*)(int32_t)>(ggml.type_traits)(type);
}

size_t row_size(const ProductFunctions& ggml, int32_t type, int64_t count) {
    return reinterpret_cast<size_t (*)(int32_t, int64_t)>(ggml.row_size)(type, count);
}

size_t aligned(size_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool is_matrix(const GgmlTensor* t) { return t != nullptr && t->ne[2] == 1 && t->ne[3] == 1; }

}  // namespace

bool SlicedProduct::can_take(const GgmlTensor* node, const ProductFunctions& ggml, int num_threads) {
    const GgmlTensor *weights = node->src[0], *rows = node->src[1];
    if (!is_matrix(weights) || !is_matrix(rows) || !is_matrix(node)) return false;
    const TypeTraits* traits = traits_of(ggml, weights->type);
    if (traits == nullptr || traits->dot == nullptr) return false;
    const TypeTraits* row_traits = traits_of(ggml, traits->dot_type);
    const bool known = rows->type == kGgmlTypeF32 && node->type == kGgmlTypeF32 && rows->ne[0] == weights->ne[0] &&
                       node->ne[0] == weights->ne[1] && node->ne[1] == rows->ne[1] && rows->ne[1] <= kMostRows &&
                       weights->nb[1] == row_size(ggml, weights->type, weights->ne[0]) &&
                       rows->nb[0] == sizeof(float) && node->nb[0] == sizeof(float) &&
                       (traits->dot_type == kGgmlTypeF32 || (row_traits != nullptr && row_traits->from_float != nullptr));
    if (!known) return false;
    ggml_ = ggml;
    const size_t wanted = num_threads * rows->ne[1] * aligned(row_size(ggml, traits->dot_type, rows->ne[0])) + kAlignment;
    if (rows_.size() < wanted) rows_.resize(wanted);
    reserved_threads_ = std::max(reserved_threads_, num_threads);
    return true;
}

void SlicedProduct::multiply(GgmlTensor* node, int thread, int num_threads, const WeightStream& weights) {
    const int num_workers = std::min(num_threads, reserved_threads_);
    if (thread >= num_workers) return;
    const GgmlTensor *matrix = node->src[0], *rows = node->src[1];
    const TypeTraits* traits = traits_of(ggml_, matrix->type);
    const int64_t size = matrix->ne[0], num_rows = rows->ne[1];
    const size_t row_bytes = aligned(row_size(ggml_, traits->dot_type, size));
    const auto* values = static_cast<const char*>(rows->data);
    char* own = reinterpret_cast<char*>(aligned(reinterpret_cast<uintptr_t>(rows_.data()))) + thread * num_rows * row_bytes;
    const char* converted[kMostRows];
    for (int64_t i = 0; i < num_rows; ++i) {
        converted[i] = values + i * rows->nb[1];
        if (traits->dot_type == kGgmlTypeF32) continue;
        traits_of(ggml_, traits->dot_type)->from_float(reinterpret_cast<const float*>(converted[i]), own + i * row_bytes, size);
        converted[i] = own + i * row_bytes;
    }
    const auto* first = static_cast<const char*>(matrix->data);
    auto* out = static_cast<char*>(node->data);
    const int64_t end = matrix->ne[1] * (thread + 1) / num_workers;
    const int64_t step = std::max<int64_t>(kSliceBytes / int64_t(matrix->nb[1]), 1);
    for (int64_t begin = matrix->ne[1] * thread / num_workers; begin < end; begin += step) {
        const int64_t slice_end = std::min(begin + step, end);
        for (int64_t row = begin; row < slice_end; ++row)
            for (int64_t i = 0; i < num_rows; ++i)
                traits->dot(int(size), reinterpret_cast<float*>(out + i * node->nb[1]) + row, 0, first + row * matrix->nb[1], 0,
                            converted[i], 0, 1);
        weights.give_back(first + begin * matrix->nb[1], first + slice_end * matrix->nb[1]);
    }
}

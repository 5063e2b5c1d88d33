#include "packed_products.h"

#include <algorithm>
#include <cstring>

#include "pack.h"

namespace {

bool is_matrix(const GgmlTensor* t) { return t != nullptr && t->ne[2] == 1 && t->ne[3] == 1; }

// Rows of float32 whose values lie side by side.
bool is_rows(const GgmlTensor* t) {
    return is_matrix(t) && t->type == kGgmlTypeF32 && t->nb[0] == sizeof(float) && t->nb[1] % sizeof(float) == 0;
}

bool has_params(const GgmlTensor* node, const int32_t (&params)[16]) { return std::memcmp(node->op_params, params, sizeof params) == 0; }

}  // namespace

void PackedProducts::want(std::vector<CustomOp>& wanted) {
    wanted.push_back({multiply, this, params_});
    wanted.push_back({multiply_same, this, same_params_});
}

bool PackedProducts::set(const PackedWeights* weights, int num_weights) {
    for (int i = 0; i < num_weights; ++i) {
        const PackedMatrix& matrix = weights[i].matrix;
        if (i > 0 && weights[i - 1].data >= weights[i].data) return false;
        if (lowtide_packed_bytes(matrix.format, matrix.num_rows, matrix.num_columns) == 0 || matrix.panels == nullptr) return false;
    }
    std::vector<PackedWeights> own(weights, weights + num_weights);
    weights_.swap(own);
    return true;
}

const PackedMatrix* PackedProducts::packed(const GgmlTensor* weights) const {
    const auto before = [](const PackedWeights& one, const void* data) { return one.data < data; };
    const auto found = std::lower_bound(weights_.begin(), weights_.end(), static_cast<const void*>(weights->data), before);
    const bool fits = found != weights_.end() && found->data == weights->data && found->matrix.format == weights->type &&
                      found->matrix.num_columns == weights->ne[0] && found->matrix.num_rows == weights->ne[1];
    return fits ? &found->matrix : nullptr;
}

bool PackedProducts::take(GgmlTensor* node, int32_t custom, int num_threads) {
    const GgmlTensor *weights = node->src[0], *rows = node->src[1];
    const bool known = !weights_.empty() && kernels_ != nullptr && is_matrix(weights) && is_rows(rows) && is_rows(node) &&
                       packed(weights) != nullptr && rows->ne[0] == weights->ne[0] && node->ne[0] == weights->ne[1] &&
                       node->ne[1] == rows->ne[1];
    if (!known || !product_.reserve(int(rows->ne[1]), int(rows->ne[0]), num_threads)) {
        if (node->op != custom) last_rows_ = nullptr;
        return false;
    }
    const bool are_quantised = rows == last_rows_;
    last_rows_ = rows;
    node->op = custom;
    std::memcpy(node->op_params, are_quantised ? same_params_ : params_, sizeof params_);
    ++num_taken_;
    return true;
}

bool PackedProducts::is_taken(const GgmlTensor* node) const { return has_params(node, params_) || has_params(node, same_params_); }

void PackedProducts::multiply(GgmlTensor* node, int thread, int num_threads, void* user_data) {
    static_cast<PackedProducts*>(user_data)->run(node, false, thread, num_threads);
}

void PackedProducts::multiply_same(GgmlTensor* node, int thread, int num_threads, void* user_data) {
    static_cast<PackedProducts*>(user_data)->run(node, true, thread, num_threads);
}

void PackedProducts::run(GgmlTensor* node, bool are_quantised, int thread, int num_threads) {
    const GgmlTensor* rows = node->src[1];
    product_.run(*packed(node->src[0]), static_cast<const float*>(rows->data), rows->nb[1] / sizeof(float), int(rows->ne[1]),
                 are_quantised, static_cast<float*>(node->data), node->nb[1] / sizeof(float), *kernels_, thread, num_threads);
}

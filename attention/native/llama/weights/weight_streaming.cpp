// Releases the pages of weights, between nodes or during a matmul.

#include "llama/weights/weight_streaming.h"

#include <algorithm>
#include <iterator>

#include "system/file_pages.h"

namespace {

constexpr int kNoGroup = -1;
constexpr uintptr_t kFaultAroundBytes = 64 << 10;  // what Linux maps around a page that is read

}  // namespace

bool WeightStream::set(const WeightSpan* spans, int num_spans, const uint8_t* keep_resident, int num_groups) {
    for (int i = 0; i < num_spans; ++i) {
        const bool in_order = spans[i].begin <= spans[i].end && (i == 0 || spans[i - 1].end <= spans[i].begin);
        if (!in_order || spans[i].group < 0 || spans[i].group >= num_groups) return false;
    }
    std::vector<WeightSpan> new_spans(spans, spans + num_spans);
    std::vector<uint8_t> new_keep_resident(keep_resident, keep_resident + num_groups), not_resident(num_groups, 0);
    spans_.swap(new_spans), keep_resident_.swap(new_keep_resident), is_resident_.swap(not_resident);
    current_ = kNoGroup;
    return true;
}

const WeightSpan* WeightStream::span_of(const char* data) const {
    const auto after = std::upper_bound(spans_.begin(), spans_.end(), data,
                                        [](const char* at, const WeightSpan& span) { return at < span.begin; });
    return after != spans_.begin() && data < std::prev(after)->end ? &*std::prev(after) : nullptr;
}

int WeightStream::group_of(const GgmlTensor* source) const {
    const WeightSpan* span = span_of(static_cast<const char*>(source->data));
    return span == nullptr ? kNoGroup : span->group;
}

bool WeightStream::enters_group(const GgmlTensor* node) {
    if (spans_.empty()) return false;
    const int before = current_;
    for (const GgmlTensor* source : node->src) {
        const int group = source == nullptr ? kNoGroup : group_of(source);
        if (group == kNoGroup) continue;
        is_resident_[group] = 1;
        current_ = group;
    }
    return current_ != before;
}

bool WeightStream::reads(const GgmlTensor* node, int group) const {
    return std::any_of(std::begin(node->src), std::end(node->src),
                       [&](const GgmlTensor* source) { return source != nullptr && group_of(source) == group; });
}

void WeightStream::release_others(const GgmlTensor* node) {
    for (int group = 0; group < int(is_resident_.size()); ++group) {
        if (!is_resident_[group] || keep_resident_[group] || reads(node, group)) continue;
        release_pages(group);
        is_resident_[group] = 0;
    }
}

void WeightStream::release_pages(int group) {
    for (const WeightSpan& span : spans_) {
        if (span.group != group) continue;
        const size_t num_bytes = span.page_end - span.page_begin;
        if (release_file_pages(span.page_begin, num_bytes)) freed_bytes_ += num_bytes;
    }
}

bool WeightStream::is_streamed_alone(const GgmlTensor* weight) const {
    const WeightSpan* span = span_of(static_cast<const char*>(weight->data));
    const auto* end = static_cast<const char*>(weight->data) + weight->nb[1] * weight->ne[1];
    return span != nullptr && !keep_resident_[span->group] && span->begin == weight->data && span->end == end;
}

void WeightStream::release_pages(const char* begin, const char* end) const {
    const WeightSpan* span = span_of(begin);
    if (span == nullptr) return;
    const auto around = [](uintptr_t at) { return at / kFaultAroundBytes * kFaultAroundBytes; };
    char* first = std::max(reinterpret_cast<char*>(around(reinterpret_cast<uintptr_t>(begin))), span->page_begin);
    char* last = std::min(reinterpret_cast<char*>(around(reinterpret_cast<uintptr_t>(end))), span->page_end);
    if (first < last) release_file_pages(first, last - first);
}

namespace {

constexpr int64_t kSliceBytes = 1 << 20;
constexpr int64_t kMaxRows = 8;
constexpr size_t kAlignment = 64;

// ggml's public ggml_type_traits_cpu (ggml-cpu.h).
struct TypeTraits {
    void (*from_float)(const float* from, void* to, int64_t count);
    void (*dot)(int count, float* result, size_t, const void* weights, size_t, const void* row, size_t, int num_rows);
    int32_t dot_type;
    int64_t num_rows;
};

const TypeTraits* traits_of(const GgmlMatmulFunctions& ggml, int32_t type) {
    return reinterpret_cast<const TypeTraits* (*)(int32_t)>(ggml.type_traits)(type);
}

size_t row_size(const GgmlMatmulFunctions& ggml, int32_t type, int64_t count) {
    return reinterpret_cast<size_t (*)(int32_t, int64_t)>(ggml.row_size)(type, count);
}

size_t aligned(size_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool is_matrix(const GgmlTensor* t) { return t != nullptr && t->ne[2] == 1 && t->ne[3] == 1; }

}  // namespace

bool StreamedMatmul::can_replace(const GgmlTensor* node, const GgmlMatmulFunctions& ggml, int num_threads) {
    const GgmlTensor *weights = node->src[0], *rows = node->src[1];
    if (!is_matrix(weights) || !is_matrix(rows) || !is_matrix(node)) return false;
    const TypeTraits* traits = traits_of(ggml, weights->type);
    if (traits == nullptr || traits->dot == nullptr) return false;
    const TypeTraits* row_traits = traits_of(ggml, traits->dot_type);
    const bool is_known = rows->type == kGgmlTypeF32 && node->type == kGgmlTypeF32 && rows->ne[0] == weights->ne[0] &&
                       node->ne[0] == weights->ne[1] && node->ne[1] == rows->ne[1] && rows->ne[1] <= kMaxRows &&
                       weights->nb[1] == row_size(ggml, weights->type, weights->ne[0]) &&
                       rows->nb[0] == sizeof(float) && node->nb[0] == sizeof(float) &&
                       (traits->dot_type == kGgmlTypeF32 || (row_traits != nullptr && row_traits->from_float != nullptr));
    if (!is_known) return false;
    ggml_ = ggml;
    const size_t needed = num_threads * rows->ne[1] * aligned(row_size(ggml, traits->dot_type, rows->ne[0])) + kAlignment;
    if (converted_.size() < needed) converted_.resize(needed);
    reserved_threads_ = std::max(reserved_threads_, num_threads);
    return true;
}

void StreamedMatmul::multiply(GgmlTensor* node, int thread, int num_threads, const WeightStream& weights) {
    const int num_workers = std::min(num_threads, reserved_threads_);
    if (thread >= num_workers) return;
    const GgmlTensor *matrix = node->src[0], *rows = node->src[1];
    const TypeTraits* traits = traits_of(ggml_, matrix->type);
    const int64_t size = matrix->ne[0], num_rows = rows->ne[1];
    const size_t row_bytes = aligned(row_size(ggml_, traits->dot_type, size));
    const auto* values = static_cast<const char*>(rows->data);
    char* buffer = reinterpret_cast<char*>(aligned(reinterpret_cast<uintptr_t>(converted_.data()))) + thread * num_rows * row_bytes;
    const char* converted[kMaxRows];
    for (int64_t i = 0; i < num_rows; ++i) {
        converted[i] = values + i * rows->nb[1];
        if (traits->dot_type == kGgmlTypeF32) continue;
        traits_of(ggml_, traits->dot_type)->from_float(reinterpret_cast<const float*>(converted[i]), buffer + i * row_bytes, size);
        converted[i] = buffer + i * row_bytes;
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
        weights.release_pages(first + begin * matrix->nb[1], first + slice_end * matrix->nb[1]);
    }
}

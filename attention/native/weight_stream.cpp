#include "weight_stream.h"

#include <sys/mman.h>

#include <algorithm>
#include <iterator>

namespace {

constexpr int kNoGroup = -1;
constexpr uintptr_t kAroundBytes = 64 << 10;  // what the system maps around a page that is read

}  // namespace

bool WeightStream::set(const WeightSpan* spans, int num_spans, const uint8_t* kept, int num_groups) {
    for (int i = 0; i < num_spans; ++i) {
        const bool in_order = spans[i].begin <= spans[i].end && (i == 0 || spans[i - 1].end <= spans[i].begin);
        if (!in_order || spans[i].group < 0 || spans[i].group >= num_groups) return false;
    }
    std::vector<WeightSpan> new_spans(spans, spans + num_spans);
    std::vector<uint8_t> new_kept(kept, kept + num_groups), none(num_groups, 0);
    spans_.swap(new_spans), kept_.swap(new_kept), resident_.swap(none);
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
        resident_[group] = 1;
        current_ = group;
    }
    return current_ != before;
}

bool WeightStream::reads(const GgmlTensor* node, int group) const {
    return std::any_of(std::begin(node->src), std::end(node->src),
                       [&](const GgmlTensor* source) { return source != nullptr && group_of(source) == group; });
}

void WeightStream::leave_others(const GgmlTensor* node) {
    for (int group = 0; group < int(resident_.size()); ++group) {
        if (!resident_[group] || kept_[group] || reads(node, group)) continue;
        give_back(group);
        resident_[group] = 0;
    }
}

void WeightStream::give_back(int group) {
    for (const WeightSpan& span : spans_) {
        if (span.group != group) continue;
        const size_t num_bytes = span.page_end - span.page_begin;
        if (madvise(span.page_begin, num_bytes, MADV_DONTNEED) == 0) given_back_bytes_ += num_bytes;
    }
}

bool WeightStream::is_streamed_alone(const GgmlTensor* weight) const {
    const WeightSpan* span = span_of(static_cast<const char*>(weight->data));
    const auto* end = static_cast<const char*>(weight->data) + weight->nb[1] * weight->ne[1];
    return span != nullptr && !kept_[span->group] && span->begin == weight->data && span->end == end;
}

void WeightStream::give_back(const char* begin, const char* end) const {
    const WeightSpan* span = span_of(begin);
    if (span == nullptr) return;
    const auto around = [](uintptr_t at) { return at / kAroundBytes * kAroundBytes; };
    char* first = std::max(reinterpret_cast<char*>(around(reinterpret_cast<uintptr_t>(begin))), span->page_begin);
    char* last = std::min(reinterpret_cast<char*>(around(reinterpret_cast<uintptr_t>(end))), span->page_end);
    if (first < last) madvise(first, last - first, MADV_DONTNEED);
}

// Top-k by a histogram of the weights' leading bits: weights are not negative, so their bits are in order.

#include "key_set.h"

#include <algorithm>
#include <cstring>
#include <functional>

namespace {

constexpr uint8_t kHidden = 0, kVisible = 1, kPicked = 2, kForced = 3;
constexpr int kBinShift = 20, kNumBins = 1 << 11;

uint32_t bits_of(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    return bits;
}

}  // namespace

void KeySet::reserve(int num_cells) {
    if (marks_.capacity() >= size_t(num_cells)) return;
    cells_.reserve(num_cells), picks_.reserve(num_cells), marks_.reserve(num_cells), candidates_.reserve(num_cells);
}

size_t KeySet::num_bytes() const {
    return sizeof(int32_t) * (cells_.capacity() + picks_.capacity() + candidates_.capacity()) + marks_.capacity();
}

void KeySet::made_for(const AttentionProblem& p) { mask_ = p.mask, num_keys_ = p.num_keys, num_rows_ = p.num_rows; }

void KeySet::take_all(const AttentionProblem& p) {
    forget();
    made_for(p);
    is_all_ = true;
}

// Marks what any row sees, and each row's first and last keys as forced; returns how many are visible.
int KeySet::mark(const AttentionProblem& p, const SelectionRule& rule) {
    marks_.assign(p.num_keys, kHidden);
    for (int row = 0; row < p.num_rows; ++row) {
        const auto* mask = reinterpret_cast<const uint16_t*>(p.mask + row * p.mask_row_stride);
        for (int j = 0; j < p.num_keys; ++j) marks_[j] |= mask[j] != kHiddenKey;
        int left = rule.num_first;
        for (int j = 0; j < p.num_keys && left > 0; ++j)
            if (mask[j] != kHiddenKey) marks_[j] = kForced, --left;
        left = rule.num_last;
        for (int j = p.num_keys - 1; j >= 0 && left > 0; --j)
            if (mask[j] != kHiddenKey) marks_[j] = kForced, --left;
    }
    num_forced_ = int(std::count(marks_.begin(), marks_.end(), kForced));
    return p.num_keys - int(std::count(marks_.begin(), marks_.end(), kHidden));
}

void KeySet::choose(const AttentionProblem& p, const SelectionRule& rule, const float* weights) {
    forget();
    made_for(p);
    const int num_visible = mark(p, rule), budget = rule.budget(num_visible);
    is_all_ = budget >= num_visible;
    if (is_all_) return;
    mark_heaviest(budget - num_forced_, weights);
    for (int j = 0; j < p.num_keys; ++j)
        if (marks_[j] == kPicked) picks_.push_back(j);
    gather();
}

void KeySet::renew(const AttentionProblem& p, const SelectionRule& rule) {
    made_for(p);
    const int num_visible = mark(p, rule);
    is_all_ = rule.budget(num_visible) >= num_visible;
    for (const int32_t pick : picks_)
        if (pick < p.num_keys && marks_[pick] == kVisible) marks_[pick] = kPicked;
    gather();
}

void KeySet::mark_heaviest(int wanted, const float* weights) {
    if (wanted <= 0) return;
    const int num_keys = int(marks_.size());
    int histogram[kNumBins] = {};
    for (int j = 0; j < num_keys; ++j) histogram[bits_of(weights[j]) >> kBinShift] += marks_[j] == kVisible;
    int bin = kNumBins - 1, above = 0;
    while (bin > 0 && above + histogram[bin] < wanted) above += histogram[bin--];
    candidates_.clear();
    for (int j = 0; j < num_keys; ++j)
        if (marks_[j] == kVisible && int(bits_of(weights[j]) >> kBinShift) == bin) candidates_.push_back(bits_of(weights[j]));
    const size_t rank = std::min(size_t(wanted - above), candidates_.size());
    if (rank == 0) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + (rank - 1), candidates_.end(), std::greater<uint32_t>());
    const uint32_t least = candidates_[rank - 1];
    int num_equal = int(rank - std::count_if(candidates_.begin(), candidates_.end(), [=](uint32_t bits) { return bits > least; }));
    for (int j = 0; j < num_keys; ++j) {
        if (marks_[j] != kVisible) continue;
        const uint32_t bits = bits_of(weights[j]);
        if (bits > least || (bits == least && num_equal-- > 0)) marks_[j] = kPicked;
    }
}

void KeySet::gather() {
    cells_.clear();
    for (int j = 0; j < int(marks_.size()); ++j)
        if (marks_[j] >= kPicked) cells_.push_back(j);
}

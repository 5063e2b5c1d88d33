#include "pass_parts.h"

#include <algorithm>
#include <numeric>

namespace {

constexpr int kMostMasks = 16;

const uint16_t* mask_of(const AttentionProblem& p, int row) {
    return reinterpret_cast<const uint16_t*>(p.mask + row * p.mask_row_stride);
}

}  // namespace

void PassParts::set(int num_shared, int num_parts, const int32_t* num_rows, const int32_t* const* cells, const int32_t* num_cells) {
    masks_.reserve(kMostMasks);
    masks_.clear();
    parts_.clear();
    parts_.reserve(num_parts);
    problems_.resize(num_parts);
    for (int i = 0, first_row = 0; i < num_parts; first_row += num_rows[i++]) {
        Part part{first_row, num_rows[i], std::vector<int32_t>(size_t(num_shared) + num_cells[i])};
        std::iota(part.cells.begin(), part.cells.begin() + num_shared, 0);
        std::copy(cells[i], cells[i] + num_cells[i], part.cells.begin() + num_shared);
        parts_.push_back(std::move(part));
    }
    last_layer_ = -1;
}

size_t PassParts::num_bytes() const {
    size_t total = sizeof(Part) * parts_.capacity() + sizeof(AttentionProblem) * problems_.capacity();
    for (const Part& part : parts_) total += sizeof(int32_t) * part.cells.capacity();
    return total;
}

AttentionProblem PassParts::problem(const AttentionProblem& whole, int i) const {
    const Part& part = parts_[i];
    AttentionProblem p = whole;
    p.q += part.first_row * p.q_row_stride, p.mask += part.first_row * p.mask_row_stride;
    p.out += part.first_row * p.out_row_stride;
    p.num_rows = part.num_rows;
    p.selected = part.cells.data(), p.num_keys = int(part.cells.size());
    return p;
}

bool PassParts::agree(const AttentionProblem& whole, int layer, int num_threads) {
    barrier_.wait(num_threads, [&] {
        if (layer <= last_layer_) masks_.clear();  // layers come in order: this is another pass
        last_layer_ = layer;
        agree_ = find(whole);
        for (int i = 0; agree_ && i < num_parts(); ++i) problems_[i] = problem(whole, i);
    });
    return agree_;
}

// All layers over one cache share one mask: it is looked at once in a pass.
bool PassParts::find(const AttentionProblem& whole) {
    for (const auto& [mask, found] : masks_)
        if (mask == whole.mask) return found;
    const bool found = compare(whole);
    num_refused_ += !found;
    if (masks_.size() < kMostMasks) masks_.emplace_back(whole.mask, found);
    return found;
}

// Every key that a row sees must be one of its part's: as many in all as in the part.
bool PassParts::compare(const AttentionProblem& whole) const {
    const Part& last = parts_.back();
    if (last.first_row + last.num_rows != whole.num_rows) return false;
    for (const Part& part : parts_) {
        for (const int32_t cell : part.cells)
            if (cell < 0 || cell >= whole.num_keys) return false;
        for (int row = part.first_row; row < part.first_row + part.num_rows; ++row) {
            const uint16_t* mask = mask_of(whole, row);
            int seen = 0, own = 0;
            for (int j = 0; j < whole.num_keys; ++j) seen += mask[j] != kHiddenKey;
            for (const int32_t cell : part.cells) own += mask[cell] != kHiddenKey;
            if (seen == 0 || seen != own) return false;
        }
    }
    return true;
}

// Checks the layout of a batch against its mask, and copies slots.

#include "llama/batch.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "attention/partials.h"

namespace {

constexpr int kMaxMasks = 16;

const uint16_t* mask_row(const AttentionProblem& p, int token) {
    return reinterpret_cast<const uint16_t*>(p.mask + token * p.mask_token_stride);
}

}  // namespace

void BatchLayout::set(int num_shared, int num_sequences, const int32_t* num_tokens, const int32_t* const* slots, const int32_t* num_slots) {
    masks_.reserve(kMaxMasks);
    masks_.clear();
    slices_.clear();
    slices_.reserve(num_sequences);
    problems_.resize(num_sequences);
    for (int i = 0, first_token = 0; i < num_sequences; first_token += num_tokens[i++]) {
        SequenceSlice slice{first_token, num_tokens[i], std::vector<int32_t>(size_t(num_shared) + num_slots[i])};
        std::iota(slice.slots.begin(), slice.slots.begin() + num_shared, 0);
        std::copy(slots[i], slots[i] + num_slots[i], slice.slots.begin() + num_shared);
        slices_.push_back(std::move(slice));
    }
    find_shared();
    last_layer_ = -1;
}

bool BatchLayout::shares_chunk(const SequenceSlice& one, const SequenceSlice& other, int chunk) const {
    const size_t begin = size_t(chunk) * kChunkKeys, end = begin + kChunkKeys;
    return one.num_tokens <= kFewTokens && other.num_tokens <= kFewTokens && end <= one.slots.size() && end <= other.slots.size() &&
           std::memcmp(one.slots.data() + begin, other.slots.data() + begin, sizeof(int32_t) * kChunkKeys) == 0;
}

// Splits each run of slices that share all chunks so far into runs that share the next one, too.
void BatchLayout::find_shared() {
    shared_.chunks.clear(), shared_.num_shared.assign(slices_.size(), 0);
    shared_.num_tokens = 0, shared_.max_shared = 0;
    for (const SequenceSlice& slice : slices_) shared_.max_shared = std::max(shared_.max_shared, int(slice.slots.size() / kChunkKeys));
    shared_.chunk_ids.assign(slices_.size() * shared_.max_shared, 0);
    std::vector<std::pair<int, int>> runs{{0, num_sequences()}};
    for (int chunk = 0; !runs.empty(); ++chunk) {
        std::vector<std::pair<int, int>> longer;
        for (const auto& [first, last] : runs)
            for (int begin = first, end; begin < last; begin = end) {
                int num_tokens = slices_[begin].num_tokens;
                for (end = begin + 1; end < last && shares_chunk(slices_[begin], slices_[end], chunk) &&
                                      num_tokens + slices_[end].num_tokens <= kTileTokens; ++end)
                    num_tokens += slices_[end].num_tokens;
                if (end == begin + 1) continue;
                for (int i = begin; i < end; ++i) {
                    shared_.num_shared[i] = chunk + 1;
                    shared_.chunk_ids[size_t(i) * shared_.max_shared + chunk] = int(shared_.chunks.size());
                }
                shared_.chunks.push_back({begin, end, chunk, num_tokens, shared_.num_tokens});
                shared_.num_tokens += num_tokens;
                longer.emplace_back(begin, end);
            }
        runs.swap(longer);
    }
}

bool BatchLayout::keeps_busy(int num_kv_heads, int num_threads) const {
    if (num_sequences() * num_kv_heads >= 2 * num_threads) return true;
    const auto has_short_rest = [this](size_t i) { return 2 * size_t(shared_.num_shared[i]) * kChunkKeys >= slices_[i].slots.size(); };
    for (size_t i = 0; i < slices_.size(); ++i)
        if (!has_short_rest(i)) return false;
    return true;
}

size_t BatchLayout::num_bytes() const {
    size_t total = shared_.num_bytes() + sizeof(SequenceSlice) * slices_.capacity() + sizeof(AttentionProblem) * problems_.capacity();
    for (const SequenceSlice& slice : slices_) total += sizeof(int32_t) * slice.slots.capacity();
    return total;
}

AttentionProblem BatchLayout::problem(const AttentionProblem& whole, int i) const {
    const SequenceSlice& slice = slices_[i];
    AttentionProblem p = whole;
    p.q += slice.first_token * p.q_token_stride, p.mask += slice.first_token * p.mask_token_stride;
    p.out += slice.first_token * p.out_token_stride;
    p.num_tokens = slice.num_tokens;
    p.selected_slots = slice.slots.data(), p.num_keys = int(slice.slots.size());
    return p;
}

bool BatchLayout::matches_mask(const AttentionProblem& whole, int layer, ThreadGroup& threads) {
    threads.single([&] {
        if (layer <= last_layer_) masks_.clear();  // layers come in order, so this is another forward pass
        last_layer_ = layer;
        matches_ = check_mask(whole);
        for (int i = 0; matches_ && i < num_sequences(); ++i) problems_[i] = problem(whole, i);
        for (int i = 0; matches_ && i + threads.num_threads < num_sequences(); ++i) {
            problems_[i].following = &problems_[i + threads.num_threads];
            problems_[i].following_begin = shared_.num_shared[i + threads.num_threads] * kChunkKeys;
        }
    });
    return matches_;
}

// All layers over one cache share one mask, which is checked once per pass.
bool BatchLayout::check_mask(const AttentionProblem& whole) {
    for (const auto& [mask, found] : masks_)
        if (mask == whole.mask) return found;
    const bool found = compare(whole);
    num_refused_ += !found;
    if (masks_.size() < kMaxMasks) masks_.emplace_back(whole.mask, found);
    return found;
}

// Every key that a token sees must be one of its sequence's slots: it must see as many keys in all as there.
bool BatchLayout::compare(const AttentionProblem& whole) const {
    const SequenceSlice& last = slices_.back();
    if (last.first_token + last.num_tokens != whole.num_tokens) return false;
    for (const SequenceSlice& slice : slices_) {
        for (const int32_t slot : slice.slots)
            if (slot < 0 || slot >= whole.num_keys) return false;
        for (int token = slice.first_token; token < slice.first_token + slice.num_tokens; ++token) {
            const uint16_t* mask = mask_row(whole, token);
            int num_visible = 0, num_own = 0;
            for (int j = 0; j < whole.num_keys; ++j) num_visible += mask[j] != kMaskedKey;
            for (const int32_t slot : slice.slots) num_own += mask[slot] != kMaskedKey;
            if (num_visible == 0 || num_visible != num_own) return false;
        }
    }
    return true;
}

void LayerSlots::set(const AttentionProblem& p) {
    keys_ = {const_cast<char*>(p.k), p.k_key_stride, p.k_head_stride, stored_bytes(p.k_type, p.key_dim)};
    values_ = {const_cast<char*>(p.v), p.v_key_stride, p.v_head_stride, stored_bytes(p.v_type, p.value_dim)};
    num_heads_ = p.num_kv_heads, num_slots_ = p.num_keys;
}

bool LayerSlots::copy(int from, int to) const {
    if (from < 0 || to < 0 || from >= num_slots_ || to >= num_slots_) return false;
    if (from == to) return true;
    keys_.copy(from, to, num_heads_);
    values_.copy(from, to, num_heads_);
    return true;
}

void LayerSlots::Vectors::copy(int from, int to, int num_heads) const {
    for (int head = 0; head < num_heads; ++head) {
        char* token = first + head * head_stride;
        std::memcpy(token + to * slot_stride, token + from * slot_stride, num_bytes);
    }
}

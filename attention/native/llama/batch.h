#pragma once

// What a batch of llama.cpp contains: its sequences and their KV slots, which slots hold a layer's keys, and how many
// keys its mask shows.

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "attention/flash.h"
#include "attention/problem.h"
#include "threads.h"

// The sequences of a batch over a cache that holds several. Each has its tokens side by side, and sees the slots that
// all share and its own. A sequence attends to its slots alone, in the order of its tokens, so its sums have the
// order of a cache with that sequence alone. If the batch's mask contradicts the layout, the layout is ignored and
// that is counted.
class BatchLayout {
public:
    // All sequences see the first `num_shared` slots. Sequence i has num_tokens[i] tokens and num_slots[i] slots of
    // its own. Without sequences, a batch is one sequence again. Throws std::bad_alloc.
    void set(int num_shared, int num_sequences, const int32_t* num_tokens, const int32_t* const* slots, const int32_t* num_slots);

    bool is_active() const { return !slices_.empty(); }
    int num_sequences() const { return int(slices_.size()); }
    int64_t num_refused() const { return num_refused_; }
    size_t num_bytes() const;

    // The problem of sequence i inside that of the whole batch.
    AttentionProblem problem(const AttentionProblem& whole, int i) const;

    // Whether the layout agrees with the mask. If it agrees, `problems` are valid until the next call.
    bool matches_mask(const AttentionProblem& whole, int layer, ThreadGroup& threads);
    const AttentionProblem* problems() const { return problems_.data(); }

    // The keys that neighbouring sequences of few tokens attend to in the same slots.
    const SharedChunks& shared() const { return shared_; }

    // Whether all threads have work in one pass over all sequences; else they split the keys of each.
    bool keeps_busy(int num_kv_heads, int num_threads) const;

private:
    struct SequenceSlice {
        int first_token, num_tokens;
        std::vector<int32_t> slots;
    };
    void find_shared();
    bool shares_chunk(const SequenceSlice& one, const SequenceSlice& other, int chunk) const;
    bool compare(const AttentionProblem& whole) const;
    bool check_mask(const AttentionProblem& whole);

    std::vector<SequenceSlice> slices_;
    std::vector<AttentionProblem> problems_;
    SharedChunks shared_;
    std::vector<std::pair<const char*, bool>> masks_;  // of this pass, and the results of their checks
    int last_layer_ = -1;
    bool matches_ = false;
    int64_t num_refused_ = 0;
};

// Where a pass had the keys and values of a layer: for copying one slot into another.
class LayerSlots {
public:
    void set(const AttentionProblem& problem);
    void clear() { num_slots_ = 0; }

    // Returns false and copies nothing if there are no such slots.
    bool copy(int from, int to) const;

private:
    struct Vectors {
        char* first = nullptr;
        size_t slot_stride = 0, head_stride = 0, num_bytes = 0;  // of one head
        void copy(int from, int to, int num_heads) const;
    };
    Vectors keys_, values_;
    int num_heads_ = 0, num_slots_ = 0;
};

// How many keys the last token of a batch sees. All layers over one cache share one mask, which is counted once.
class VisibleKeyCounter {
public:
    // Layers come in order: one that does not follow the last one begins another pass.
    int count(const AttentionProblem& p, int layer) {
        if (layer <= last_layer_) masks_.clear();
        last_layer_ = layer;
        for (const auto& [mask, visible] : masks_)
            if (mask == p.mask) return visible;
        const auto* mask = reinterpret_cast<const uint16_t*>(p.mask + (p.num_tokens - 1) * p.mask_token_stride);
        int visible = 0;
        for (int j = 0; j < p.num_keys; ++j) visible += mask[j] != kMaskedKey;
        if (masks_.size() < masks_.capacity()) masks_.emplace_back(p.mask, visible);
        return visible;
    }

    void reserve() { masks_.reserve(16); }

private:
    std::vector<std::pair<const char*, int>> masks_;
    int last_layer_ = -1;
};

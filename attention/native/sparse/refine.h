#pragma once

// Refines approximate attention: records the scores of a few tokens, and replaces the contribution of some keys to a
// finished result.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/problem.h"
#include "containers.h"

// Scores of some heads of one token.
struct RecordedScores {
    const float* scores;         // (num_heads, stride)
    const float* softmax_stats;  // (num_heads, 2), as in AttentionProblem
    const float* thresholds;     // (num_heads): a score above it has more than the wanted share of the head's weight
    int num_heads, stride;

    // Whether a key, or one of the kBlockKeys keys from `first` on (the start of a block), exceeds a head's
    // threshold.
    bool exceeds_threshold(int key) const;
    bool block_exceeds_threshold(int first) const;

    // Subtracts the partials `removed` from the output of the heads of `head_problem`, a problem of one token, and
    // adds `added`.
    void replace(const AttentionProblem& head_problem, const float* removed, const float* added) const;
};

// Records the scores of problems of a few tokens.
class ScoreRecorder {
public:
    static constexpr int kMaxTokens = 4;

    // Reserves room for `num_problems`, each of up to that many tokens (at most kMaxTokens), heads and keys. Throws
    // std::bad_alloc.
    void reserve(int num_problems, int num_tokens, int num_heads, int num_keys);

    // Has a problem write its scores here.
    void record(AttentionProblem& problem, int index);

    // The scores of `num_heads` of the `total_heads` of a recorded problem, for one token. The thresholds are where a
    // key has the share `threshold` of a head's weight. Called by one thread for each token and head.
    RecordedScores scores_of(int index, int token, int total_heads, int first_head, int num_heads, float threshold);

    size_t num_bytes() const { return sizeof(float) * (scores_.capacity() + softmax_stats_.capacity() + thresholds_.capacity()); }

private:
    std::vector<float> scores_, softmax_stats_, thresholds_;
    size_t queries_per_problem_ = 0;
    int stride_ = 0;
};

// The part of a problem that belongs to one token and the heads of one KV head.
AttentionProblem view_of_head(const AttentionProblem& problem, int kv_head, int token);

// Scratch per thread: the partials that are added and removed for the heads of one KV head, and two lists of pending
// keys.
class MergeScratch {
public:
    static constexpr int kMaxPending = kChunkKeys;

    struct ThreadScratch {
        float *added, *removed;
        int32_t *keys, *clusters;  // (kMaxPending)
    };

    // Reserves scratch for `num_threads` threads. Throws std::bad_alloc.
    void reserve(const AttentionProblem& p, int num_threads) {
        ensure_size(partials_, 2 * head_floats(p) * num_threads), ensure_size(slots_, size_t(2 * kMaxPending) * num_threads);
    }

    ThreadScratch for_thread(const AttentionProblem& p, int thread) {
        float* added = partials_.data() + 2 * head_floats(p) * thread;
        int32_t* keys = slots_.data() + size_t(2 * kMaxPending) * thread;
        return {added, added + head_floats(p), keys, keys + kMaxPending};
    }

    size_t num_bytes() const { return sizeof(float) * partials_.capacity() + sizeof(int32_t) * slots_.capacity(); }

private:
    static size_t head_floats(const AttentionProblem& p) { return size_t(p.group_size()) * partial_floats(p); }

    std::vector<float> partials_;
    std::vector<int32_t> slots_;
};

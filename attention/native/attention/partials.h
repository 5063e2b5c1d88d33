#pragma once

// Partial results of attention over a chunk of keys, and how they are merged. The order of merging is that of the
// chunks, so whoever computes a chunk, a token's result is the same.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/problem.h"

constexpr int kFewTokens = 8;  // up to so many tokens are those of decoding, and have their heads or keys split

// Adds the partial result of one chunk to that of the chunks before it: log-sum-exp with the larger maximum.
static inline void merge(float* into, const float* partial, int value_dim) {
    constexpr float kEmpty = -std::numeric_limits<float>::infinity();
    if (partial[0] == kEmpty) return;
    const float largest = std::max(into[0], partial[0]);
    const float old_factor = into[0] == kEmpty ? 0.0f : std::exp(into[0] - largest);
    const float new_factor = std::exp(partial[0] - largest);
    into[0] = largest;
    into[1] = into[1] * old_factor + partial[1] * new_factor;
    for (int d = 2; d < 2 + value_dim; ++d) into[d] = into[d] * old_factor + partial[d] * new_factor;
}

static inline void start_partial(float* partial, int value_dim) {
    std::memset(partial, 0, sizeof(float) * (2 + value_dim));
    partial[0] = -std::numeric_limits<float>::infinity();
}

// A token that sees no key gets zeros. An attention sink is a score without a value: it only adds to the softmax's
// sum.
static inline void write_output(const AttentionProblem& p, int token, int head, float* merged) {
    if (p.sinks != nullptr) {
        float sink[2 + kMaxHeadDim] = {p.sinks[head], 1.0f};
        merge(merged, sink, p.value_dim);
    }
    auto* out = reinterpret_cast<float*>(p.out + token * p.out_token_stride + head * p.out_head_stride);
    const float inverse = merged[1] == 0.0f ? 0.0f : 1.0f / merged[1];
    for (int d = 0; d < p.value_dim; ++d) out[d] = merged[2 + d] * inverse;
    if (p.scores == nullptr || token < p.first_scored_token) return;
    float* softmax_stats = p.softmax_stats + 2 * (size_t(token - p.first_scored_token) * p.num_heads + head);
    softmax_stats[0] = merged[0], softmax_stats[1] = inverse;
}

static inline int num_chunks_of(const AttentionProblem& p) { return (p.num_keys + kChunkKeys - 1) / kChunkKeys; }

static inline int chunk_end(const AttentionProblem& p, int chunk) { return std::min((chunk + 1) * kChunkKeys, p.num_keys); }

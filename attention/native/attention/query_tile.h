#pragma once

// A query tile against one block of keys: scores and online softmax. A query is one head of one token; the queries of
// a tile see the same keys. Included by the kernels and compiled with their flags.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention/kv_row.h"
#include "attention/problem.h"
#include "simd.h"

namespace {

constexpr int kMaxDirectQueries = 8;  // tiles of up to so many queries read the stored keys directly

struct QueryTile {
    int count;
    const float* q[kMaxDirectQueries];
    const float* bias[kMaxDirectQueries];
    float* partials[kMaxDirectQueries];
    float* scores_out[kMaxDirectQueries];  // where to export a query's scores, or null
};

// Turns the scores of N queries into softmax weights under each partial's running maximum. Writes the factors that
// rescale the older sums. The queries advance together: alone, each would wait for its own sums across lanes.
template <int N> void softmax_tile(const AttentionProblem& p, const QueryTile& tile, float* scores, float* factors) {
    float largest[N];
    Floats largest_lanes[N];
    for (int n = 0; n < N; ++n) {
        float* query = scores + n * kBlockKeys;
        const float* bias = tile.bias[n];
        const bool is_capped = p.softcap != 0.0f;
        if (is_capped)
            for (int j = 0; j < kBlockKeys; ++j) query[j] = p.softcap * std::tanh(query[j] * p.scale / p.softcap) + bias[j];
        largest_lanes[n] = splat(tile.partials[n][0]);
        for (int j = 0; j < kBlockKeys; j += W) {
            const Floats some = is_capped ? load(query + j) : load(query + j) * p.scale + load(bias + j);
            store(query + j, some);
            largest_lanes[n] = some > largest_lanes[n] ? some : largest_lanes[n];
        }
        if (tile.scores_out[n] != nullptr) std::memcpy(tile.scores_out[n], query, sizeof(float) * kBlockKeys);
    }
    for (int n = 0; n < N; ++n) {
        largest[n] = largest_of_lanes(largest_lanes[n]);
        if (largest[n] == kMinusInfinity) largest[n] = 0.0f;  // only if a score is NaN
    }
    Floats sums[N];
    for (int n = 0; n < N; ++n) {
        sums[n] = Floats{};
        for (int j = 0; j < kBlockKeys; j += W) {
            const Floats weight = exp_nonpositive(load(scores + n * kBlockKeys + j) - largest[n]);
            store(scores + n * kBlockKeys + j, weight);
            sums[n] += weight;
        }
    }
    for (int n = 0; n < N; ++n) {
        float* partial = tile.partials[n];
        factors[n] = partial[0] == kMinusInfinity ? 0.0f : partial[0] == largest[n] ? 1.0f : exp_one(partial[0] - largest[n]);
        partial[1] = partial[1] * factors[n] + sum_of_lanes(sums[n]);
        partial[0] = largest[n];
    }
}

// A block of keys: the addresses of its rows, and which of them each token sees.

// The row of a missing key in a last, shorter block. It means zeros in every storage type.
alignas(64) constexpr char kZeroKey[4 * kMaxHeadDim] = {};

struct KeyBlock {
    int begin, count;
    const char* keys[kBlockKeys];
    const char* values[kBlockKeys];
};

inline void locate(const AttentionProblem& p, int kv_head, int begin, KeyBlock& block) {
    block.begin = begin;
    block.count = p.num_keys - begin < kBlockKeys ? p.num_keys - begin : kBlockKeys;
    const char* keys = p.k + kv_head * p.k_head_stride;
    const char* values = p.v + kv_head * p.v_head_stride;
    if (p.selected_slots == nullptr) {
        for (int j = 0; j < kBlockKeys; ++j) block.keys[j] = keys + (begin + j) * p.k_key_stride;
        for (int j = 0; j < kBlockKeys; ++j) block.values[j] = values + (begin + j) * p.v_key_stride;
    } else {
        for (int j = 0; j < block.count; ++j) {
            const size_t slot = p.selected_slots[begin + j];
            block.keys[j] = keys + slot * p.k_key_stride, block.values[j] = values + slot * p.v_key_stride;
        }
    }
    for (int j = block.count; j < kBlockKeys; ++j) block.keys[j] = block.values[j] = kZeroKey;
}

alignas(64) constexpr float kNoBias[kBlockKeys] = {};

// A token's mask over a block. `bias` is added to the scores: -inf if a key is masked or missing.
struct BlockMask {
    int num_visible;
    const float* bias;
};

// `bias_out` is filled if the bias is not all zeros.
inline BlockMask read_mask(const AttentionProblem& p, int token, const KeyBlock& block, float* bias_out) {
    const auto* mask = reinterpret_cast<const uint16_t*>(p.mask + token * p.mask_token_stride);
    uint16_t copied[kBlockKeys];
    const uint16_t* values = copied;
    if (p.selected_slots != nullptr)
        for (int j = 0; j < block.count; ++j) copied[j] = mask[p.selected_slots[block.begin + j]];
    else if (block.count == kBlockKeys)
        values = mask + block.begin;
    else
        std::memcpy(copied, mask + block.begin, sizeof(uint16_t) * block.count);
    for (int j = block.count; j < kBlockKeys; ++j) copied[j] = kMaskedKey;
    uint16_t any = 0;
    for (int j = 0; j < kBlockKeys; ++j) any |= values[j];
    if (any == 0) return {kBlockKeys, kNoBias};
    uint16_t num_masked = 0;
    for (int j = 0; j < kBlockKeys; ++j) num_masked += values[j] == kMaskedKey;
    if (num_masked < kBlockKeys)
        for (int j = 0; j < kBlockKeys; j += W)
            store(bias_out + j, KvRow<KvType::f16>::load(reinterpret_cast<const char*>(values), j));
    return {kBlockKeys - num_masked, bias_out};
}

// Scores of a block, from rows as they are stored or from transposed keys.

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kTileQueries = 6;

// How many vectors of sums per query stay in registers, beside the operands.
constexpr int num_sum_vectors(int num_queries) {
    int vectors = 4;
    while (vectors > 1 && num_queries * vectors + vectors + 1 > kRegisters) vectors /= 2;
    return vectors;
}

// Prefetches into the L2 cache: L1 cannot have enough requests in flight to hide the latency of memory.
inline void prefetch(const char* row, size_t num_bytes) {
    for (size_t at = 0; at < num_bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// How many of a query's four sums run side by side, so that one load of the operands serves them all.
constexpr int sums_side_by_side(int num_queries) {
    int sums = 4;
    while (sums > 1 && (sums + kQuads) * num_queries + 2 * kQuads > kRegisters) sums /= 2;
    return sums;
}

// Scores straight from the stored rows. Prefetches the keys of the block `next` on the way.
template <KvType Type, int N>
void score_stored(const KeyBlock& block, const KeyBlock& next, const QueryTile& tile, int key_dim, float* scores) {
    constexpr int S = sums_side_by_side(N);
    const size_t num_bytes = KvRow<Type>::num_bytes(key_dim);
    for (int j = 0; j < kBlockKeys; j += W) {
        Floats sums[4][N] = {};
#pragma GCC unroll 4
        for (int first = 0; first < 4; first += S) {
            for (int g = first; g < first + S; ++g)
                for (int i = 0; i < kQuads; ++i) prefetch(next.keys[j + g + 4 * i], num_bytes);
            for (int d = 0; d < key_dim; d += W) {
                Floats q[N][kQuads];
                for (int n = 0; n < N; ++n)
                    for (int i = 0; i < kQuads; ++i) q[n][i] = in_every_quad(tile.q[n] + d + 4 * i);
#pragma GCC unroll 4
                for (int s = 0; s < S; ++s) {
                    const char* const* keys = block.keys + j + first + s;  // every fourth key
                    Floats quads[kQuads];
                    for (int i = 0; i < kQuads; ++i) quads[i] = KvRow<Type>::load(keys[4 * i], d);
                    transpose_quads(quads);
                    for (int i = 0; i < kQuads; ++i)
                        for (int n = 0; n < N; ++n) sums[first + s][n] += q[n][i] * quads[i];
                }
            }
        }
        for (int n = 0; n < N; ++n) store(scores + n * kBlockKeys + j, sums_of_quads(sums[0][n], sums[1][n], sums[2][n], sums[3][n]));
    }
}

// The sums over every fourth channel stay in registers; none is stored and loaded again.
template <int N> void score_transposed_in_registers(const float* keys, const QueryTile& tile, int key_dim, float* scores) {
    for (int j = 0; j < kBlockKeys; j += W) {
        Floats sums[4][N] = {};
        for (int d = 0; d < key_dim; d += 4) {
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) {
                const Floats k = load(keys + (d + c) * kBlockKeys + j);
                for (int n = 0; n < N; ++n) sums[c][n] += tile.q[n][d + c] * k;
            }
        }
        for (int n = 0; n < N; ++n) store(scores + n * kBlockKeys + j, ((sums[0][n] + sums[1][n]) + sums[2][n]) + sums[3][n]);
    }
}

// Scores from transposed keys (key_dim, kBlockKeys). The sums are over every fourth channel, then of those four sums:
// the same order as in `score_stored`.
template <int N> void score_transposed(const float* keys, const QueryTile& tile, int key_dim, float* scores) {
    if constexpr (W == 16 && N <= 6) return score_transposed_in_registers<N>(keys, tile, key_dim, scores);
    constexpr int V = num_sum_vectors(N);
    for (int j = 0; j < kBlockKeys; j += V * W) {
        for (int first = 0; first < 4; ++first) {
            Floats sums[N][V] = {};
            for (int d = first; d < key_dim; d += 4) {
                Floats k[V];
                for (int i = 0; i < V; ++i) k[i] = load(keys + d * kBlockKeys + j + i * W);
                for (int n = 0; n < N; ++n)
                    for (int i = 0; i < V; ++i) sums[n][i] += tile.q[n][d] * k[i];
            }
            for (int n = 0; n < N; ++n)
                for (int i = 0; i < V; ++i) {
                    float* at = scores + n * kBlockKeys + j + i * W;
                    store(at, first == 0 ? sums[n][i] : load(at) + sums[n][i]);
                }
        }
    }
}

}  // namespace

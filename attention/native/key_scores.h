#pragma once

// Scores of a block of keys, from rows as they are stored or from keys that were turned. Included by the
// kernels.

#include "key_block.h"
#include "lines.h"
#include "vectors.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kTileLines = 6;
constexpr int kAhead = 2 * kBlockKeys;  // what is asked for while a block is read: memory is the bound

// Vectors of each line's sums that stay in registers beside as many operands.
constexpr int vectors_beside(int lines) {
    int vectors = 4;
    while (vectors > 1 && lines * vectors + vectors + 1 > kRegisters) vectors /= 2;
    return vectors;
}

// Into the second-level cache: the first one has too few requests under way to hide memory's latency.
inline void prefetch(const char* row, size_t num_bytes) {
    for (size_t at = 0; at < num_bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// How many of the four sums of a line go on side by side, so that operands loaded once serve them all.
constexpr int sums_side_by_side(int lines) {
    int sums = 4;
    while (sums > 1 && (sums + kQuads) * lines + 2 * kQuads > kRegisters) sums /= 2;
    return sums;
}

// Scores straight from stored rows; asks for the keys of the block `ahead` on the way.
template <KvType Type, int N>
void score_stored(const KeyBlock& block, const KeyBlock& ahead, const Lines& lines, int key_size, float* scores) {
    constexpr int S = sums_side_by_side(N);
    const size_t num_bytes = Rows<Type>::num_bytes(key_size);
    for (int j = 0; j < kBlockKeys; j += W) {
        Floats sums[4][N] = {};
#pragma GCC unroll 4
        for (int first = 0; first < 4; first += S) {
            for (int g = first; g < first + S; ++g)
                for (int i = 0; i < kQuads; ++i) prefetch(ahead.keys[j + g + 4 * i], num_bytes);
            for (int d = 0; d < key_size; d += W) {
                Floats q[N][kQuads];
                for (int n = 0; n < N; ++n)
                    for (int i = 0; i < kQuads; ++i) q[n][i] = in_every_quad(lines.q[n] + d + 4 * i);
#pragma GCC unroll 4
                for (int s = 0; s < S; ++s) {
                    const char* const* keys = block.keys + j + first + s;  // every fourth
                    Floats quads[kQuads];
                    for (int i = 0; i < kQuads; ++i) quads[i] = Rows<Type>::load(keys[4 * i], d);
                    turn_quads(quads);
                    for (int i = 0; i < kQuads; ++i)
                        for (int n = 0; n < N; ++n) sums[first + s][n] += q[n][i] * quads[i];
                }
            }
        }
        for (int n = 0; n < N; ++n) store(scores + n * kBlockKeys + j, sums_of_quads(sums[0][n], sums[1][n], sums[2][n], sums[3][n]));
    }
}

// The sums of every fourth channel stand in registers side by side: none is stored and read again.
template <int N> void score_turned_at_once(const float* keys, const Lines& lines, int key_size, float* scores) {
    for (int j = 0; j < kBlockKeys; j += W) {
        Floats sums[4][N] = {};
        for (int d = 0; d < key_size; d += 4) {
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) {
                const Floats k = load(keys + (d + c) * kBlockKeys + j);
                for (int n = 0; n < N; ++n) sums[c][n] += lines.q[n][d + c] * k;
            }
        }
        for (int n = 0; n < N; ++n) store(scores + n * kBlockKeys + j, ((sums[0][n] + sums[1][n]) + sums[2][n]) + sums[3][n]);
    }
}

// Scores from a turned block: keys (key_size, kBlockKeys). Every fourth channel first, as above.
template <int N> void score_turned(const float* keys, const Lines& lines, int key_size, float* scores) {
    if constexpr (W == 16 && N <= 6) return score_turned_at_once<N>(keys, lines, key_size, scores);
    constexpr int V = vectors_beside(N);
    for (int j = 0; j < kBlockKeys; j += V * W) {
        for (int first = 0; first < 4; ++first) {
            Floats sums[N][V] = {};
            for (int d = first; d < key_size; d += 4) {
                Floats k[V];
                for (int i = 0; i < V; ++i) k[i] = load(keys + d * kBlockKeys + j + i * W);
                for (int n = 0; n < N; ++n)
                    for (int i = 0; i < V; ++i) sums[n][i] += lines.q[n][d] * k[i];
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

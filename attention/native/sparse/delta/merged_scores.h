#pragma once

// Scores of a page of merged keys (BlockStore). A stored block is multiplied once; a key's score is the sum over
// blocks of the dot products to which it is assigned. Included by the kernels and compiled with their flags.

#include <cstdint>

#include "attention/kv_row.h"
#include "attention/problem.h"
#include "attention/query_tile.h"
#include "simd.h"

namespace {

struct MergedPage {
    const uint8_t* counts;
    const uint8_t* assignments;
    const uint16_t* values;
};

inline MergedPage merged_page(const AttentionProblem& p, int kv_head, int page) {
    const BlockStoreView& store = p.merged_keys->stores[kv_head];
    const size_t first_block = size_t(page) * (p.key_dim / p.merged_keys->block_size);
    return {store.counts + first_block, store.assignments + first_block * kBlockKeys, store.values + store.offsets[page]};
}

// So many blocks are multiplied before their dot products are looked up: a value that was just stored is slow to
// load.
constexpr int kBlocksPerStep = 8;

// One query's dot products with the stored vectors of a block.
struct PartialDots {
    alignas(64) float dots[kBlockKeys + W];
};

// The assignments of W keys to `count` stored vectors.
inline Ints load_assignments(const uint8_t* assignments, int key, int count) {
    if (count > kMaxPacked) return load_u8(assignments + key);
    constexpr int kHalf = kBlockKeys / 2;
    return load_u8(assignments + key % kHalf) >> (key < kHalf ? 0 : 4) & 15;
}

// The dot products of these assignments.
inline Floats lookup_dots(const PartialDots& partials, Ints ids, [[maybe_unused]] int count) {
    const float* from = partials.dots;
#if VECTOR_FLOATS == 16
    const Floats low = Floats(_mm512_permutex2var_ps(__m512(load(from)), __m512i(ids), __m512(load(from + W))));
    if (count <= 2 * W) return low;
    const Floats high = Floats(_mm512_permutex2var_ps(__m512(load(from + 2 * W)), __m512i(ids), __m512(load(from + 3 * W))));
    return ids < 2 * W ? low : high;
#elif VECTOR_FLOATS == 8
    const Floats low = Floats(_mm256_permutevar8x32_ps(__m256(load(from)), __m256i(ids)));
    if (count <= W) return low;
    const Floats second = Floats(_mm256_permutevar8x32_ps(__m256(load(from + W)), __m256i(ids)));
    if (count <= 2 * W) return ids < W ? low : second;
    return Floats(_mm256_i32gather_ps(from, __m256i(ids), sizeof(float)));
#else
    Floats found;
    for (int i = 0; i < W; ++i) found[i] = from[ids[i]];
    return found;
#endif
}

// Adds the dot products of some blocks to the scores of the keys, (N, kBlockKeys).
template <int N>
void add_partial_dots(const MergedPage& page, int first_block, int num_blocks, const PartialDots (*partials)[N], float* scores) {
    const uint8_t* assignments = page.assignments + size_t(first_block) * kBlockKeys;
    for (int key = 0; key < kBlockKeys; key += W) {
        Floats sums[N];
        for (int n = 0; n < N; ++n) sums[n] = load(scores + n * kBlockKeys + key);
        for (int i = 0; i < num_blocks; ++i) {
            const int count = page.counts[first_block + i];
            const Ints ids = load_assignments(assignments + i * kBlockKeys, key, count);
            for (int n = 0; n < N; ++n) sums[n] += lookup_dots(partials[i][n], ids, count);
        }
        for (int n = 0; n < N; ++n) store(scores + n * kBlockKeys + key, sums[n]);
    }
}

// Multiplies N queries by the `count` stored vectors of a block, which begins at `channel`.
template <int Block, int N>
inline void dot_stored(const uint16_t* values, int count, const QueryTile& tile, int channel, PartialDots* partials) {
    for (int i = 0; i < count; i += W) {
        Floats sums[N] = {};
#pragma GCC unroll 16
        for (int c = 0; c < Block; ++c) {
            const Floats k = KvRow<KvType::f16>::load(reinterpret_cast<const char*>(values), c * count + i);
            for (int n = 0; n < N; ++n) sums[n] += tile.q[n][channel + c] * k;
        }
        for (int n = 0; n < N; ++n) store(partials[n].dots + i, sums[n]);
    }
}

// Scores (N, kBlockKeys) for one block size.
template <int Block, int N> void score_blocks(const MergedPage& page, int key_dim, const QueryTile& tile, float* scores) {
    std::memset(scores, 0, sizeof(float) * N * kBlockKeys);
    PartialDots partials[kBlocksPerStep][N];
    const uint16_t* values = page.values;
    const int num_blocks = key_dim / Block;
    for (int first = 0; first < num_blocks; first += kBlocksPerStep) {
        const int num_blocks_now = num_blocks - first < kBlocksPerStep ? num_blocks - first : kBlocksPerStep;
        for (int i = 0; i < num_blocks_now; ++i) {
            const int count = page.counts[first + i];
            dot_stored<Block, N>(values, count, tile, (first + i) * Block, partials[i]);
            values += Block * count;
        }
        add_partial_dots<N>(page, first, num_blocks_now, partials, scores);
    }
}

template <int N> void score_merged(const MergedPage& page, const AttentionProblem& p, const QueryTile& tile, float* scores) {
    switch (p.merged_keys->block_size) {
        case 1: return score_blocks<1, N>(page, p.key_dim, tile, scores);
        case 8: return score_blocks<8, N>(page, p.key_dim, tile, scores);
        default: return score_blocks<16, N>(page, p.key_dim, tile, scores);
    }
}

}  // namespace

#pragma once

// Scores of a page of states. Of each block of channels what was sent is multiplied, once; a key's score is the sum of the
// products of the groups that it is in, one a block. Included by the kernels.

#include <cstdint>

#include "attention_problem.h"
#include "byte_lanes.h"
#include "kv_rows.h"
#include "lines.h"
#include "vectors.h"

namespace {

struct StatePage {
    const uint8_t* counts;
    const uint8_t* members;
    const uint16_t* values;
};

inline StatePage page_of(const AttentionProblem& p, int kv_head, int page) {
    const StateStore& store = p.states->stores[kv_head];
    const size_t first_block = size_t(page) * (p.key_size / p.states->block);
    return {store.counts + first_block, store.members + first_block * kBlockKeys, store.values + store.begins[page]};
}

// So many blocks are multiplied before their products are read: what was just stored is not there yet.
constexpr int kBlocksTogether = 8;

// One line's product with each group of a block.
struct Products {
    alignas(64) float of_groups[kBlockKeys + W];
};

// The groups that W keys are in, of so many.
inline Ints groups_of(const uint8_t* members, int key, int count) {
    if (count > kFewGroups) return load_small(members + key);
    constexpr int kHalf = kBlockKeys / 2;
    return load_small(members + key % kHalf) >> (key < kHalf ? 0 : 4) & 15;
}

// The products of those groups, one each.
inline Floats products_of(const Products& products, Ints groups, int count) {
    const float* from = products.of_groups;
#if VECTOR_FLOATS == 16
    const Floats low = Floats(_mm512_permutex2var_ps(__m512(load(from)), __m512i(groups), __m512(load(from + W))));
    if (count <= 2 * W) return low;
    const Floats high = Floats(_mm512_permutex2var_ps(__m512(load(from + 2 * W)), __m512i(groups), __m512(load(from + 3 * W))));
    return groups < 2 * W ? low : high;
#elif VECTOR_FLOATS == 8
    const Floats low = Floats(_mm256_permutevar8x32_ps(__m256(load(from)), __m256i(groups)));
    if (count <= W) return low;
    const Floats second = Floats(_mm256_permutevar8x32_ps(__m256(load(from + W)), __m256i(groups)));
    if (count <= 2 * W) return groups < W ? low : second;
    return Floats(_mm256_i32gather_ps(from, __m256i(groups), sizeof(float)));
#else
    Floats found;
    for (int i = 0; i < W; ++i) found[i] = from[groups[i]];
    return found;
#endif
}

// Adds the products of blocks to the scores of keys, (N, kBlockKeys).
template <int N> void add_products(const StatePage& page, int first_block, int num_blocks, const Products (*products)[N], float* scores) {
    const uint8_t* members = page.members + size_t(first_block) * kBlockKeys;
    for (int key = 0; key < kBlockKeys; key += W) {
        Floats sums[N];
        for (int n = 0; n < N; ++n) sums[n] = load(scores + n * kBlockKeys + key);
        for (int i = 0; i < num_blocks; ++i) {
            const int count = page.counts[first_block + i];
            const Ints groups = groups_of(members + i * kBlockKeys, key, count);
            for (int n = 0; n < N; ++n) sums[n] += products_of(products[i][n], groups, count);
        }
        for (int n = 0; n < N; ++n) store(scores + n * kBlockKeys + key, sums[n]);
    }
}

// Multiplies N lines with the `count` groups of a block, whose channels begin at `channel`.
template <int Block, int N>
inline void multiply_groups(const uint16_t* values, int count, const Lines& lines, int channel, Products* products) {
    for (int i = 0; i < count; i += W) {
        Floats sums[N] = {};
#pragma GCC unroll 16
        for (int c = 0; c < Block; ++c) {
            const Floats k = Rows<KvType::f16>::load(reinterpret_cast<const char*>(values), c * count + i);
            for (int n = 0; n < N; ++n) sums[n] += lines.q[n][channel + c] * k;
        }
        for (int n = 0; n < N; ++n) store(products[n].of_groups + i, sums[n]);
    }
}

// Scores (N, kBlockKeys), of blocks of so many channels.
template <int Block, int N> void score_blocks(const StatePage& page, int key_size, const Lines& lines, float* scores) {
    std::memset(scores, 0, sizeof(float) * N * kBlockKeys);
    Products products[kBlocksTogether][N];
    const uint16_t* values = page.values;
    const int num_blocks = key_size / Block;
    for (int first = 0; first < num_blocks; first += kBlocksTogether) {
        const int num_together = num_blocks - first < kBlocksTogether ? num_blocks - first : kBlocksTogether;
        for (int i = 0; i < num_together; ++i) {
            const int count = page.counts[first + i];
            multiply_groups<Block, N>(values, count, lines, (first + i) * Block, products[i]);
            values += Block * count;
        }
        add_products<N>(page, first, num_together, products, scores);
    }
}

template <int N> void score_states(const StatePage& page, const AttentionProblem& p, const Lines& lines, float* scores) {
    switch (p.states->block) {
        case 1: return score_blocks<1, N>(page, p.key_size, lines, scores);
        case 8: return score_blocks<8, N>(page, p.key_size, lines, scores);
        default: return score_blocks<16, N>(page, p.key_size, lines, scores);
    }
}

}  // namespace

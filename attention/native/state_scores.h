#pragma once

// Scores of a page of states. Of each block of channels what was sent is multiplied, once, and each product stands until
// the next: a score is the sum of the blocks' products that stand. So by how much each product differs from the one
// before goes to the key that sent it, and a sum along the keys makes scores of the changes. Included by the kernels.

#include <cstdint>

#include "attention_problem.h"
#include "kv_rows.h"
#include "lines.h"
#include "vectors.h"

namespace {

struct StatePage {
    const uint64_t* sent;
    const uint16_t* values;
};

inline StatePage page_of(const AttentionProblem& p, int kv_head, int page) {
    const StateStore& store = p.states->stores[kv_head];
    return {store.sent + size_t(page) * (p.key_size / p.states->block), store.values + store.begins[page]};
}

// Products of one line with what a block sent, behind a 0 that stands before the first one.
struct Products {
    float standing[1 + kBlockKeys + W] = {};
};

// Adds by how much products differ from those before to the keys that sent them.
inline void add_changes(uint64_t sent, const Products& products, float* scores) {
    const float* at = products.standing + 1;
#if VECTOR_FLOATS == 16 && defined(__AVX512F__)
    for (int key = 0; key < kBlockKeys; key += W) {
        const auto keys = uint16_t(sent >> key);
        const Floats changes = load(at) - load(at - 1);
        store(scores + key, load(scores + key) + Floats(_mm512_maskz_expand_ps(keys, __m512(changes))));
        at += __builtin_popcount(keys);
    }
#else
    for (; sent != 0; sent &= sent - 1, ++at) scores[__builtin_ctzll(sent)] += at[0] - at[-1];
#endif
}

template <int Step = 1> inline Floats sums_up_to(Floats values) {
    Ints pick;
    for (int i = 0; i < W; ++i) pick[i] = i < Step ? i : W + i - Step;
    values += __builtin_shuffle(Floats{}, values, pick);
    if constexpr (2 * Step < W) return sums_up_to<2 * Step>(values);
    return values;
}

inline void sum_along_keys(float* scores) {
    float sum = 0.0f;
    for (int key = 0; key < kBlockKeys; key += W) {
        const Floats sums = sums_up_to(load(scores + key)) + sum;
        store(scores + key, sums);
        sum = sums[W - 1];
    }
}

// Scores (N, kBlockKeys) of blocks of so many channels.
template <int Block, int N> void score_blocks(const StatePage& page, int key_size, const Lines& lines, float* scores) {
    std::memset(scores, 0, sizeof(float) * N * kBlockKeys);
    Products products[N];
    const char* values = reinterpret_cast<const char*>(page.values);
    for (int first = 0; first < key_size; first += Block) {
        const uint64_t sent = page.sent[first / Block];
        const int count = __builtin_popcountll(sent);
        for (int i = 0; i < count; i += W) {
            Floats sums[N] = {};
#pragma GCC unroll 16
            for (int c = 0; c < Block; ++c) {
                const Floats k = Rows<KvType::f16>::load(values, c * count + i);
                for (int n = 0; n < N; ++n) sums[n] += lines.q[n][first + c] * k;
            }
            for (int n = 0; n < N; ++n) store(products[n].standing + 1 + i, sums[n]);
        }
        values += sizeof(uint16_t) * Block * count;
        for (int n = 0; n < N; ++n) add_changes(sent, products[n], scores + n * kBlockKeys);
    }
    for (int n = 0; n < N; ++n) sum_along_keys(scores + n * kBlockKeys);
}

template <int N> void score_states(const StatePage& page, const AttentionProblem& p, const Lines& lines, float* scores) {
    switch (p.states->block) {
        case 1: return score_blocks<1, N>(page, p.key_size, lines, scores);
        case 8: return score_blocks<8, N>(page, p.key_size, lines, scores);
        default: return score_blocks<16, N>(page, p.key_size, lines, scores);
    }
}

}  // namespace

#pragma once

// Scores of a page of states. Of each block of channels what was sent is multiplied, once, and each product stands until
// the next: a score is the sum of the blocks' products that stand. So by how much each product differs from the one
// before goes to the key that sent it, and a sum along the keys makes scores of the changes. Included by the kernels.

#include <cstdint>

#include "attention_problem.h"
#include "expand.h"
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

// So many blocks are multiplied before their products are read: what was just stored is not there yet.
constexpr int kBlocksTogether = 8;

// By how much one line's product with each key that sent a block differs from the one before.
struct Changes {
    alignas(64) float of_sent[kBlockKeys + W];
};

// Adds the changes of blocks to the keys that sent them; block i's of a line are changes[i * stride].
inline void add_changes(const uint64_t* sent, int num_blocks, const Changes* changes, int stride, float* scores) {
#ifdef LOWTIDE_CAN_EXPAND
    const float* at[kBlocksTogether];
    for (int i = 0; i < num_blocks; ++i) at[i] = changes[i * stride].of_sent;
    for (int key = 0; key < kBlockKeys; key += W) {
        Floats changed = load(scores + key);
        for (int i = 0; i < num_blocks; ++i) {
            const uint64_t keys = sent[i] >> key & ((uint64_t(1) << W) - 1);
            changed += expanded(keys, load(at[i]));
            at[i] += __builtin_popcountll(keys);
        }
        store(scores + key, changed);
    }
#else
    for (int i = 0; i < num_blocks; ++i) {
        const float* at = changes[i * stride].of_sent;
        for (uint64_t left = sent[i]; left != 0; left &= left - 1) scores[__builtin_ctzll(left)] += *at++;
    }
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

// Multiplies N lines with the `count` keys that sent a block, whose channels begin at `channel`.
template <int Block, int N>
inline void multiply_sent(const uint16_t* values, int count, const Lines& lines, int channel, Changes* changes) {
    Floats before[N] = {};
    Ints one_up;
    for (int i = 0; i < W; ++i) one_up[i] = W - 1 + i;
    for (int i = 0; i < count; i += W) {
        Floats sums[N] = {};
#pragma GCC unroll 16
        for (int c = 0; c < Block; ++c) {
            const Floats k = Rows<KvType::f16>::load(reinterpret_cast<const char*>(values), c * count + i);
            for (int n = 0; n < N; ++n) sums[n] += lines.q[n][channel + c] * k;
        }
        for (int n = 0; n < N; ++n) {
            store(changes[n].of_sent + i, sums[n] - __builtin_shuffle(before[n], sums[n], one_up));
            before[n] = sums[n];
        }
    }
}

// Scores (N, kBlockKeys), of blocks of so many channels.
template <int Block, int N> void score_blocks(const StatePage& page, int key_size, const Lines& lines, float* scores) {
    std::memset(scores, 0, sizeof(float) * N * kBlockKeys);
    Changes changes[kBlocksTogether][N];
    const uint16_t* values = page.values;
    const int num_blocks = key_size / Block;
    for (int first = 0; first < num_blocks; first += kBlocksTogether) {
        const uint64_t* sent = page.sent + first;
        const int num_together = num_blocks - first < kBlocksTogether ? num_blocks - first : kBlocksTogether;
        for (int i = 0; i < num_together; ++i) {
            const int count = __builtin_popcountll(sent[i]);
            multiply_sent<Block, N>(values, count, lines, (first + i) * Block, changes[i]);
            values += Block * count;
        }
        for (int n = 0; n < N; ++n) add_changes(sent, num_together, changes[0] + n, N, scores + n * kBlockKeys);
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

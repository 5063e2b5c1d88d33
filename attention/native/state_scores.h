#pragma once

// Scores of a page of states: a running sum for each line (a query head of a row), changed only by the blocks of
// channels that were sent. Included by the kernels.
//
// A vector holds one channel's products of as many lines, so that a sum costs nothing across lanes, and what a page
// sent is unpacked once for all of them. Eight sums for channels that are eight apart, then a tree of them: each line
// sums in the same order whatever lines stand beside it.

#include <cstdint>

#include "attention_problem.h"
#include "kv_rows.h"
#include "vectors.h"

namespace {

constexpr int kStateSums = 8;

struct StatePage {
    const uint64_t* sent;
    const uint16_t *before, *values;
    int num_values, bits;
};

inline StatePage page_of(const AttentionProblem& p, int kv_head, int page) {
    const StateStore& store = p.states->stores[kv_head];
    const int bits = bits_of_key(p.key_size, p.states->block);
    const uint32_t begin = store.begins[page];
    return {store.sent + size_t(page) * bits, store.before + size_t(page) * p.key_size, store.values + begin,
            int(store.begins[page + 1] - begin), bits};
}

// Tells the blocks that a key sent, in order.
template <class Tell> inline void each_sent(const StatePage& page, int key, const Tell& tell) {
    for (int at = 0; at < page.bits; at += 64) {
        const int first = key * page.bits + at;
        uint64_t left = page.sent[first / 64] >> first % 64;
        if (page.bits < 64) left &= (uint64_t(1) << page.bits) - 1;
        for (; left != 0; left &= left - 1) tell(at + __builtin_ctzll(left));
    }
}

// What a page's states begin with, and by how much each channel that was sent changes them: no more than
// kMaxHeadSize and kBlockKeys * kMaxHeadSize floats.
template <int Block> void unpack_changes(const StatePage& page, int key_size, float* before, float* changes) {
    alignas(64) float state[kMaxHeadSize];
    for (int d = 0; d < key_size; ++d) before[d] = state[d] = half_to_float(page.before[d]);
    // Halves become floats in the place of the changes, vectors first.
    int at = 0;
    for (; at + W <= page.num_values; at += W)
        store(changes + at, Rows<KvType::f16>::load(reinterpret_cast<const char*>(page.values), at));
    for (; at < page.num_values; ++at) changes[at] = half_to_float(page.values[at]);
    for (int key = 0; key < kBlockKeys; ++key)
        each_sent(page, key, [&](int block) {
            float* known = state + block * Block;
            for (int c = 0; c < Block; ++c) {
                const float sent = changes[c];
                changes[c] = sent - known[c], known[c] = sent;
            }
            changes += Block;
        });
}

// Scores (kBlockKeys) of W lines, whose queries are `q` (key_size).
template <int Block>
void score_changes(const StatePage& page, int key_size, const float* before, const float* changes, const Floats* q, Floats* scores) {
    Floats sums[kStateSums] = {};
    for (int d = 0; d < key_size; d += kStateSums)
        for (int c = 0; c < kStateSums; ++c) sums[c] += q[d + c] * before[d + c];
    for (int key = 0; key < kBlockKeys; ++key) {
        each_sent(page, key, [&](int block) {
#pragma GCC unroll 16
            for (int c = 0; c < Block; ++c) sums[(Block == 1 ? block : c) % kStateSums] += q[block * Block + c] * changes[c];
            changes += Block;
        });
        scores[key] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
}

// A page's states, unpacked for any number of lines.
struct StateScores {
    const StatePage page;
    const int key_size, block;
    float* changes;
    float before[kMaxHeadSize];

    StateScores(const AttentionProblem& p, int kv_head, int number, float* changes)
        : page(page_of(p, kv_head, number)), key_size(p.key_size), block(p.states->block), changes(changes) {
        switch (block) {
            case 1: unpack_changes<1>(page, key_size, before, changes); break;
            case 8: unpack_changes<8>(page, key_size, before, changes); break;
            default: unpack_changes<16>(page, key_size, before, changes); break;
        }
    }

    // Scores (W, kBlockKeys) of `count` lines, at most W.
    void score(const float* const* queries, int count, float* scores) const {
        Floats q[kMaxHeadSize], of_keys[kBlockKeys];
        for (int d = 0; d < key_size; d += W) {
            Floats channels[W] = {};
            for (int i = 0; i < count; ++i) channels[i] = load(queries[i] + d);
            turn(channels);
            for (int c = 0; c < W; ++c) q[d + c] = channels[c];
        }
        switch (block) {
            case 1: score_changes<1>(page, key_size, before, changes, q, of_keys); break;
            case 8: score_changes<8>(page, key_size, before, changes, q, of_keys); break;
            default: score_changes<16>(page, key_size, before, changes, q, of_keys); break;
        }
        for (int key = 0; key < kBlockKeys; key += W) {
            Floats lines[W];
            for (int i = 0; i < W; ++i) lines[i] = of_keys[key + i];
            turn(lines);
            for (int i = 0; i < count; ++i) store(scores + i * kBlockKeys + key, lines[i]);
        }
    }
};

}  // namespace

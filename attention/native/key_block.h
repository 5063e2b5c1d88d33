#pragma once

// A block of keys: where its rows lie, and which of them each query row sees. Included by the kernels.

#include <cstdint>
#include <cstring>

#include "attention_problem.h"
#include "kv_rows.h"

namespace {

// Stands in for the keys that a last, shorter block lacks; as any stored type it means zeros.
alignas(64) constexpr char kMissingKey[4 * kMaxHeadSize] = {};

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
    if (p.selected == nullptr) {
        for (int j = 0; j < kBlockKeys; ++j) block.keys[j] = keys + (begin + j) * p.k_key_stride;
        for (int j = 0; j < kBlockKeys; ++j) block.values[j] = values + (begin + j) * p.v_key_stride;
    } else {
        for (int j = 0; j < block.count; ++j) {
            const size_t cell = p.selected[begin + j];
            block.keys[j] = keys + cell * p.k_key_stride, block.values[j] = values + cell * p.v_key_stride;
        }
    }
    for (int j = block.count; j < kBlockKeys; ++j) block.keys[j] = block.values[j] = kMissingKey;
}

alignas(64) constexpr float kNoBias[kBlockKeys] = {};

// What a row's mask says of a block: `bias` is added to the scores, -inf where a key is hidden or missing.
struct BlockMask {
    int num_visible;
    const float* bias;
};

// `room` takes the bias where it is not all 0.
inline BlockMask read_mask(const AttentionProblem& p, int row, const KeyBlock& block, float* room) {
    const auto* mask = reinterpret_cast<const uint16_t*>(p.mask + row * p.mask_row_stride);
    uint16_t copied[kBlockKeys];
    const uint16_t* halves = copied;
    if (p.selected != nullptr)
        for (int j = 0; j < block.count; ++j) copied[j] = mask[p.selected[block.begin + j]];
    else if (block.count == kBlockKeys)
        halves = mask + block.begin;
    else
        std::memcpy(copied, mask + block.begin, sizeof(uint16_t) * block.count);
    for (int j = block.count; j < kBlockKeys; ++j) copied[j] = kHiddenKey;
    uint16_t any = 0;
    for (int j = 0; j < kBlockKeys; ++j) any |= halves[j];
    if (any == 0) return {kBlockKeys, kNoBias};
    uint16_t num_hidden = 0;
    for (int j = 0; j < kBlockKeys; ++j) num_hidden += halves[j] == kHiddenKey;
    if (num_hidden < kBlockKeys)
        for (int j = 0; j < kBlockKeys; j += W)
            store(room + j, Rows<KvType::f16>::load(reinterpret_cast<const char*>(halves), j));
    return {kBlockKeys - num_hidden, room};
}

}  // namespace

#pragma once

// Random attention problems in buffers of exactly the needed size, so that a sanitizer sees any access beyond them.

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention/problem.h"
#include "checks.h"
#include "simd.h"

namespace {

// A finite fp16 of moderate size.
inline uint16_t random_fp16() { return uint16_t(pick(0, 1) << 15 | pick(0x2c00, 0x4000)); }

struct Case {
    AttentionProblem p{};
    std::unique_ptr<float[]> q, out;
    std::unique_ptr<uint16_t[]> k, v, mask;
    std::vector<int32_t> slots;
    std::unique_ptr<float[]> sinks;

    uint16_t mask_of(int token, int key) const { return mask[token * p.mask_token_stride / 2 + key]; }

    // The score of a key in double, without the mask.
    double score(int token, int head, int key) const {
        const int kv_head = head / p.group_size();
        double sum = 0;
        for (int d = 0; d < p.key_dim; ++d)
            sum += double(q[(size_t(token) * p.num_heads + head) * p.key_dim + d]) *
                   fp16_to_float(k[(size_t(key) * p.num_kv_heads + kv_head) * p.key_dim + d]);
        sum *= p.scale;
        return p.softcap != 0 ? p.softcap * std::tanh(sum / p.softcap) : sum;
    }
};

// All keys, or some slots if it may `select`; with sinks or without.
inline Case random_case(bool select) {
    Case c;
    AttentionProblem& p = c.p;
    p.num_kv_heads = pick(1, 3), p.num_heads = p.num_kv_heads * pick(1, 4);
    p.num_tokens = pick(0, 3) == 0 ? pick(33, 40) : pick(1, 20), p.use_bf16 = pick(0, 1), p.num_keys = pick(1, 1100);
    p.key_dim = 16 * pick(1, 8), p.value_dim = 16 * pick(1, 8);
    p.scale = 0.1f, p.softcap = pick(0, 3) == 0 ? 5.0f : 0.0f;
    const size_t num_q = size_t(p.num_tokens) * p.num_heads * p.key_dim;
    const size_t num_k = size_t(p.num_keys) * p.num_kv_heads * p.key_dim;
    const size_t num_v = size_t(p.num_keys) * p.num_kv_heads * p.value_dim;
    const size_t num_mask = size_t(p.num_tokens) * p.num_keys;
    c.q.reset(new float[num_q]), c.k.reset(new uint16_t[num_k]), c.v.reset(new uint16_t[num_v]);
    c.mask.reset(new uint16_t[num_mask]), c.out.reset(new float[size_t(p.num_tokens) * p.num_heads * p.value_dim]);
    for (size_t i = 0; i < num_q; ++i) c.q[i] = fp16_to_float(random_fp16());
    for (size_t i = 0; i < num_k; ++i) c.k[i] = random_fp16();
    for (size_t i = 0; i < num_v; ++i) c.v[i] = random_fp16();
    for (size_t i = 0; i < num_mask; ++i) c.mask[i] = pick(0, 3) == 0 ? kMaskedKey : 0;
    p.q = reinterpret_cast<char*>(c.q.get()), p.q_head_stride = 4 * p.key_dim, p.q_token_stride = p.q_head_stride * p.num_heads;
    p.k = reinterpret_cast<char*>(c.k.get()), p.k_head_stride = 2 * p.key_dim, p.k_key_stride = p.k_head_stride * p.num_kv_heads;
    p.v = reinterpret_cast<char*>(c.v.get()), p.v_head_stride = 2 * p.value_dim, p.v_key_stride = p.v_head_stride * p.num_kv_heads;
    p.mask = reinterpret_cast<char*>(c.mask.get()), p.mask_token_stride = 2 * p.num_keys;
    if (select && pick(0, 1) == 0) {
        for (int slot = 0; slot < p.num_keys; ++slot)
            if (pick(0, 2) == 0) c.slots.push_back(slot);
        if (!c.slots.empty()) p.selected_slots = c.slots.data(), p.num_keys = int(c.slots.size());
    }
    if (pick(0, 2) == 0) {
        c.sinks.reset(new float[p.num_heads]);
        for (int i = 0; i < p.num_heads; ++i) c.sinks[i] = fp16_to_float(random_fp16());
        p.sinks = c.sinks.get();
    }
    p.out = reinterpret_cast<char*>(c.out.get()), p.out_head_stride = 4 * p.value_dim, p.out_token_stride = p.out_head_stride * p.num_heads;
    return c;
}

}  // namespace

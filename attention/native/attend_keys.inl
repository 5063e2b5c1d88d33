// The exact attention kernel, once for each instruction set: included by files that define VECTOR_FLOATS
// (lanes of a vector) and compiled with that set's flags. Vector types are GCC's and clang's own, so the
// same lines become AVX-512, AVX2, SSE2 or NEON; only half-precision loads differ.
//
// A block of keys is converted to f32 and turned, so that a vector holds one channel of as many keys:
// scores need no sums across lanes. Softmax is the online one (Milakov and Gimelshein 2018).

#include <cmath>
#include <cstring>
#include <limits>

#include "attention_problem.h"
#include "half.h"

namespace {

constexpr int W = VECTOR_FLOATS;
constexpr int kVectors = kBlockKeys / W;  // vectors across a block of keys
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
inline Floats splat(float value) { return value - Floats{}; }

// exp of values at or below zero: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients), within
// 2 units in the last place; exactly 0 below -87.
inline Floats exp_nonpositive(Floats x) {
    const Ints alive = x > splat(-87.0f);
    x = alive ? x : splat(-87.0f);
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // rounds to the nearest whole number
    const Floats n = shifted - 12582912.0f;
    Floats r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Floats y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats power;
    std::memcpy(&power, &exponent, sizeof power);
    const Floats result = y * power;
    return alive ? result : splat(0.0f);
}

inline float exp_one(float x) {
    float lane[W];
    store(lane, exp_nonpositive(splat(x)));
    return lane[0];
}

inline void row_to_floats(KvType type, const char* row, int size, float* out) {
    switch (type) {
        case KvType::f16: halves_to_floats(reinterpret_cast<const uint16_t*>(row), size, out); return;
        case KvType::q8_0: q8_0_to_floats(row, size, out); return;
        case KvType::q4_0: q4_0_to_floats(row, size, out); return;
    }
}

// One step of the turning network: interleaves the low, or the high, halves of two vectors.
template <bool High> inline Floats interleave(Floats a, Floats b) {
    Ints pick;
    for (int i = 0; i < W; ++i) pick[i] = (i % 2) * W + i / 2 + (High ? W / 2 : 0);
    return __builtin_shuffle(a, b, pick);
}

// Turns W rows of `stride` floats into W vectors at `out`, `out_stride` floats apart.
inline void turn(const float* rows, int stride, float* out, int out_stride) {
    Floats now[W], next[W];
    for (int i = 0; i < W; ++i) now[i] = load(rows + i * stride);
    for (int step = 1; step < W; step *= 2) {
        for (int i = 0; i < W / 2; ++i) {
            next[2 * i] = interleave<false>(now[i], now[i + W / 2]);
            next[2 * i + 1] = interleave<true>(now[i], now[i + W / 2]);
        }
        for (int i = 0; i < W; ++i) now[i] = next[i];
    }
    for (int i = 0; i < W; ++i) store(out + i * out_stride, now[i]);
}

// The rows of the next block are asked for while this one is converted: memory is the bound.
inline void prefetch(const char* row, size_t num_bytes) {
    for (size_t at = 0; at < num_bytes; at += 64) __builtin_prefetch(row + at);
}

inline size_t row_bytes(KvType type, int size) {
    switch (type) {
        case KvType::q8_0: return size_t(size) / 32 * 34;
        case KvType::q4_0: return size_t(size) / 32 * 18;
        default: return size_t(size) * 2;
    }
}

// Keys [begin, begin + count) as channels of a block: out (key_size, kBlockKeys); missing keys are 0.
void load_keys(const AttentionProblem& p, int kv_head, int begin, int count, float* rows, float* out) {
    const char* base = p.k + kv_head * p.k_head_stride;
    const size_t ahead = kBlockKeys * p.k_key_stride, num_bytes = row_bytes(p.k_type, p.key_size);
    for (int j = 0; j < kBlockKeys; j += W) {
        for (int i = 0; i < W; ++i) {
            float* row = rows + i * p.key_size;
            if (j + i < count) {
                const char* key = base + (begin + j + i) * p.k_key_stride;
                prefetch(key + ahead, num_bytes);
                row_to_floats(p.k_type, key, p.key_size, row);
            } else {
                std::memset(row, 0, sizeof(float) * p.key_size);
            }
        }
        for (int d = 0; d < p.key_size; d += W) turn(rows + d, p.key_size, out + d * kBlockKeys + j, kBlockKeys);
    }
}

void load_values(const AttentionProblem& p, int kv_head, int begin, int count, float* out) {
    const char* base = p.v + kv_head * p.v_head_stride;
    const size_t ahead = kBlockKeys * p.v_key_stride, num_bytes = row_bytes(p.v_type, p.value_size);
    for (int j = 0; j < count; ++j) {
        const char* value = base + (begin + j) * p.v_key_stride;
        prefetch(value + ahead, num_bytes);
        row_to_floats(p.v_type, value, p.value_size, out + j * p.value_size);
    }
}

// The row's mask over a block as floats, -inf beyond `count`; false where it hides every key.
bool load_mask(const AttentionProblem& p, int row, int begin, int count, float* bias) {
    const auto* mask = reinterpret_cast<const uint16_t*>(p.mask + row * p.mask_row_stride) + begin;
    constexpr uint16_t kHidden = 0xfc00;
    bool sees = false;
    for (int j = 0; j < count; ++j) sees |= mask[j] != kHidden;
    if (!sees) return false;
    halves_to_floats(mask, count, bias);
    for (int j = count; j < kBlockKeys; ++j) bias[j] = kMinusInfinity;
    return true;
}

template <int Heads> void score(const float* const* q, const float* keys, int key_size, float* scores) {
    Floats sums[Heads][kVectors] = {};
    for (int d = 0; d < key_size; ++d) {
        for (int i = 0; i < kVectors; ++i) {
            const Floats k = load(keys + d * kBlockKeys + i * W);
            for (int h = 0; h < Heads; ++h) sums[h][i] += q[h][d] * k;
        }
    }
    for (int h = 0; h < Heads; ++h)
        for (int i = 0; i < kVectors; ++i) store(scores + h * kBlockKeys + i * W, sums[h][i]);
}

// Scores to weights under the partial's running maximum; returns what its older sums are multiplied by.
float soften(const AttentionProblem& p, const float* bias, float* scores, float* partial) {
    if (p.softcap != 0.0f)
        for (int j = 0; j < kBlockKeys; ++j)
            scores[j] = p.softcap * std::tanh(scores[j] * p.scale / p.softcap) + bias[j];
    else
        for (int j = 0; j < kBlockKeys; j += W) store(scores + j, load(scores + j) * p.scale + load(bias + j));
    float largest = partial[0];
    for (int j = 0; j < kBlockKeys; ++j) largest = scores[j] > largest ? scores[j] : largest;
    if (largest == kMinusInfinity) largest = 0.0f;  // only with NaN in the scores
    Floats sums = {};
    for (int j = 0; j < kBlockKeys; j += W) {
        const Floats weight = exp_nonpositive(load(scores + j) - largest);
        store(scores + j, weight);
        sums += weight;
    }
    float lanes[W];
    store(lanes, sums);
    float sum = 0.0f;
    for (int i = 0; i < W; ++i) sum += lanes[i];
    const float factor = partial[0] == kMinusInfinity ? 0.0f : exp_one(partial[0] - largest);
    partial[1] = partial[1] * factor + sum;
    partial[0] = largest;
    return factor;
}

constexpr int kValueVectors = 4;  // vectors of one head's sum that are kept in registers

template <int Heads>
void weigh(const float* weights, const float* bias, const float* values, int value_size, int count,
           const float* factors, float* const* partials) {
    for (int d = 0; d < value_size; d += kValueVectors * W) {
        const int n = (value_size - d) / W < kValueVectors ? (value_size - d) / W : kValueVectors;
        Floats sums[Heads][kValueVectors];
        for (int h = 0; h < Heads; ++h)
            for (int i = 0; i < n; ++i) sums[h][i] = load(partials[h] + 2 + d + i * W) * factors[h];
        for (int j = 0; j < count; ++j) {
            if (bias[j] == kMinusInfinity) continue;  // whatever a hidden key holds stays hidden
            for (int i = 0; i < n; ++i) {
                const Floats v = load(values + j * value_size + d + i * W);
                for (int h = 0; h < Heads; ++h) sums[h][i] += weights[h * kBlockKeys + j] * v;
            }
        }
        for (int h = 0; h < Heads; ++h)
            for (int i = 0; i < n; ++i) store(partials[h] + 2 + d + i * W, sums[h][i]);
    }
}

template <int Heads>
void attend_heads(const AttentionProblem& p, int row, int head, const float* keys, const float* values,
                  const float* bias, int count, float* scores, float* partials) {
    const float* q[Heads];
    float* partial[Heads];
    float factors[Heads];
    for (int h = 0; h < Heads; ++h) {
        q[h] = reinterpret_cast<const float*>(p.q + row * p.q_row_stride + (head + h) * p.q_head_stride);
        partial[h] = partials + h * partial_floats(p);
    }
    score<Heads>(q, keys, p.key_size, scores);
    for (int h = 0; h < Heads; ++h) factors[h] = soften(p, bias, scores + h * kBlockKeys, partial[h]);
    weigh<Heads>(scores, bias, values, p.value_size, count, factors, partial);
}

void attend_keys(const AttentionProblem& p, int kv_head, int row_begin, int row_end, int key_begin,
                  int key_end, float* scratch, float* partials) {
    const int group = p.group_size();
    const int floats = partial_floats(p);
    float* keys = scratch;
    float* values = keys + kBlockKeys * kMaxHeadSize;
    float* scores = values + kBlockKeys * kMaxHeadSize;
    float* bias = scores + 2 * kBlockKeys;
    for (int begin = key_begin; begin < key_end; begin += kBlockKeys) {
        const int count = key_end - begin < kBlockKeys ? key_end - begin : kBlockKeys;
        bool loaded = false;
        for (int row = row_begin; row < row_end; ++row) {
            if (!load_mask(p, row, begin, count, bias)) continue;
            if (!loaded) {
                load_keys(p, kv_head, begin, count, values, keys);
                load_values(p, kv_head, begin, count, values);
                loaded = true;
            }
            float* of_row = partials + (row - row_begin) * group * floats;
            int h = 0;
            for (; h + 2 <= group; h += 2)
                attend_heads<2>(p, row, kv_head * group + h, keys, values, bias, count, scores, of_row + h * floats);
            if (h < group)
                attend_heads<1>(p, row, kv_head * group + h, keys, values, bias, count, scores, of_row + h * floats);
        }
    }
}

}  // namespace

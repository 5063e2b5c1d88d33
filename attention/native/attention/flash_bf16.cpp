// The kernel for many queries in bfloat16: twice as many multiplications per instruction. Operands are rounded to 8
// bits of mantissa and summed in float32. A token that sees only a part of the block still multiplies the stored
// values.

#include "cpu.h"

// Clang 16 and 17 crash on this file: their builds use the float32 kernel.
#if defined(__AVX512BF16__) && !(defined(__clang__) && (__clang_major__ == 16 || __clang_major__ == 17))
#define VECTOR_FLOATS 16
#include "attention/flash.inl"

namespace {

typedef uint32_t Pairs __attribute__((vector_size(64), aligned(4), may_alias));  // two bfloat16 in each lane

// In each lane, `low` in the lower half and `high` in the upper one.
inline Pairs to_bf16_pairs(Floats low, Floats high) {
    const __m512i a = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(__m512(low))));
    const __m512i b = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(__m512(high))));
    return Pairs(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}

inline void store_pairs(uint32_t* to, Pairs pairs) { *reinterpret_cast<Pairs*>(to) = pairs; }
inline Floats dot_bf16(Floats sums, Pairs a, uint32_t b) {
    return Floats(_mm512_dpbf16_ps(__m512(sums), __m512bh(a), __m512bh(_mm512_set1_epi32(int(b)))));
}

// Converts `count` floats, a multiple of 16, to pairs of neighbours.
inline void to_bf16_row(const float* from, int count, uint32_t* to) {
    for (int i = 0; i < count; i += W)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), __m256i(_mm512_cvtneps_pbh(__m512(load(from + i)))));
}

struct Bf16Block {
    const AttentionProblem& p;
    const KeyBlock &block, &next;
    float *keys, *values;  // scratch for pairs: keys (key_dim / 2, kBlockKeys), values (kBlockKeys / 2, value_dim)
    static constexpr int kMaxQueries = kTileQueries;
    // Even a tile of a few tokens is rounded, so a token's result does not depend on its tile.
    static constexpr bool kExact = false;

    uint32_t* key_pairs() const { return reinterpret_cast<uint32_t*>(keys); }
    uint32_t* value_pairs() const { return reinterpret_cast<uint32_t*>(values); }

    template <KvType Type> void fill_keys() const {
        for (int j = 0; j < kBlockKeys; j += W)
            for (int d = 0; d < p.key_dim; d += W) {
                if (d == 0)
                    for (int i = 0; i < W; ++i) prefetch(next.keys[j + i], KvRow<Type>::num_bytes(p.key_dim));
                Floats channels[W];
                for (int i = 0; i < W; ++i) channels[i] = KvRow<Type>::load(block.keys[j + i], d);
                transpose(channels);
                for (int c = 0; c < W; c += 2)
                    store_pairs(key_pairs() + (d + c) / 2 * kBlockKeys + j, to_bf16_pairs(channels[c], channels[c + 1]));
            }
    }
    template <KvType Type> void fill_values() const {
        for (int j = 0; j < kBlockKeys; j += 2) {
            for (int i = j; i < j + 2; ++i) prefetch(next.values[i], KvRow<Type>::num_bytes(p.value_dim));
            for (int d = 0; d < p.value_dim; d += W)
                store_pairs(value_pairs() + j / 2 * p.value_dim + d,
                            to_bf16_pairs(KvRow<Type>::load(block.values[j], d), KvRow<Type>::load(block.values[j + 1], d)));
        }
    }
    void fill() const {
        switch (p.k_type) {
            case KvType::f16: fill_keys<KvType::f16>(); break;
            case KvType::q8_0: fill_keys<KvType::q8_0>(); break;
            case KvType::q4_0: fill_keys<KvType::q4_0>(); break;
            case KvType::f32: fill_keys<KvType::f32>(); break;
        }
        switch (p.v_type) {
            case KvType::f16: return fill_values<KvType::f16>();
            case KvType::q8_0: return fill_values<KvType::q8_0>();
            case KvType::q4_0: return fill_values<KvType::q4_0>();
            case KvType::f32: return fill_values<KvType::f32>();
        }
    }

    template <int N> void score(const QueryTile& tile, float* scores) const {
        constexpr int V = kBlockKeys / W;
        uint32_t q[N][kMaxHeadDim / 2];
        for (int n = 0; n < N; ++n) to_bf16_row(tile.q[n], p.key_dim, q[n]);
        Floats sums[N][V] = {};
        for (int d = 0; d < p.key_dim / 2; ++d) {
            Pairs k[V];
            for (int i = 0; i < V; ++i) k[i] = *reinterpret_cast<const Pairs*>(key_pairs() + d * kBlockKeys + i * W);
            for (int n = 0; n < N; ++n)
                for (int i = 0; i < V; ++i) sums[n][i] = dot_bf16(sums[n][i], k[i], q[n][d]);
        }
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < V; ++i) store(scores + n * kBlockKeys + i * W, sums[n][i]);
    }

    template <int N, int V>
    void accumulate(const QueryTile& tile, const uint32_t (*weights)[kBlockKeys / 2], int channel, const float* factors) const {
        Floats sums[N][V];
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < V; ++i) sums[n][i] = load(tile.partials[n] + 2 + channel + i * W) * factors[n];
        for (int j = 0; j < kBlockKeys / 2; ++j) {
            Pairs v[V];
            for (int i = 0; i < V; ++i) v[i] = *reinterpret_cast<const Pairs*>(value_pairs() + j * p.value_dim + channel + i * W);
            for (int n = 0; n < N; ++n)
                for (int i = 0; i < V; ++i) sums[n][i] = dot_bf16(sums[n][i], v[i], weights[n][j]);
        }
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < V; ++i) store(tile.partials[n] + 2 + channel + i * W, sums[n][i]);
    }

    template <KvType Type, int N> void accumulate_stored(const QueryTile& tile, float* scores) const {
        softmax_and_accumulate<N>(p, StoredValues<Type>{block, block, 0}, tile, block.count, false, scores);
    }

    template <int N> void attend(const QueryTile& tile, bool all_visible, float* scores) const {
        score<N>(tile, scores);
        if (!all_visible) {
            switch (p.v_type) {
                case KvType::f16: return accumulate_stored<KvType::f16, N>(tile, scores);
                case KvType::q8_0: return accumulate_stored<KvType::q8_0, N>(tile, scores);
                case KvType::q4_0: return accumulate_stored<KvType::q4_0, N>(tile, scores);
                case KvType::f32: return accumulate_stored<KvType::f32, N>(tile, scores);
            }
        }
        float factors[N];
        uint32_t weights[N][kBlockKeys / 2];
        softmax_tile<N>(p, tile, scores, factors);
        for (int n = 0; n < N; ++n) to_bf16_row(scores + n * kBlockKeys, kBlockKeys, weights[n]);
        int channel = 0;
        for (; channel + 4 * W <= p.value_dim; channel += 4 * W) accumulate<N, 4>(tile, weights, channel, factors);
        for (; channel < p.value_dim; channel += W) accumulate<N, 1>(tile, weights, channel, factors);
    }
};

}  // namespace

AttendKeys avx512_bf16_attend_keys() { return processor_has("avx512_bf16") ? attend_blocks<Bf16Block> : nullptr; }
#else
#include "attention/problem.h"
AttendKeys avx512_bf16_attend_keys() { return nullptr; }
#endif

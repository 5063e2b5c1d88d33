// Many lines over a block in bfloat16: twice the products an instruction, each operand rounded to 8 bits of
// mantissa, sums in f32. What a row sees only in part is weighed from the stored values.

#include "cpu_features.h"

#if defined(__AVX512BF16__)
#define VECTOR_FLOATS 16
#include "attend_keys.inl"

namespace {

typedef uint32_t Pairs __attribute__((vector_size(64), aligned(4), may_alias));  // two bfloat16 a lane

// Lane by lane, `low` in the low half and `high` in the high one.
inline Pairs paired(Floats low, Floats high) {
    const __m512i a = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(__m512(low))));
    const __m512i b = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(__m512(high))));
    return Pairs(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}

inline void store_pairs(uint32_t* to, Pairs pairs) { *reinterpret_cast<Pairs*>(to) = pairs; }
inline Floats add_products(Floats sums, Pairs a, uint32_t b) {
    return Floats(_mm512_dpbf16_ps(__m512(sums), __m512bh(a), __m512bh(_mm512_set1_epi32(int(b)))));
}

// `count` floats, a multiple of 16, as pairs of neighbours.
inline void pair_neighbours(const float* from, int count, uint32_t* to) {
    for (int i = 0; i < count; i += W)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), __m256i(_mm512_cvtneps_pbh(__m512(load(from + i)))));
}

struct RoundedBlock {
    const AttentionProblem& p;
    const KeyBlock &block, &ahead;
    float *keys, *values;  // room for pairs: keys (key_size / 2, kBlockKeys), values (kBlockKeys / 2, value_size)
    static constexpr int kMostLines = kTileLines;
    static constexpr bool kExact = false;  // so a tile of a few rows is rounded like any other

    uint32_t* key_pairs() const { return reinterpret_cast<uint32_t*>(keys); }
    uint32_t* value_pairs() const { return reinterpret_cast<uint32_t*>(values); }

    template <KvType Type> void fill_keys() const {
        for (int j = 0; j < kBlockKeys; j += W)
            for (int d = 0; d < p.key_size; d += W) {
                if (d == 0)
                    for (int i = 0; i < W; ++i) prefetch(ahead.keys[j + i], Rows<Type>::num_bytes(p.key_size));
                Floats channels[W];
                for (int i = 0; i < W; ++i) channels[i] = Rows<Type>::load(block.keys[j + i], d);
                turn(channels);
                for (int c = 0; c < W; c += 2)
                    store_pairs(key_pairs() + (d + c) / 2 * kBlockKeys + j, paired(channels[c], channels[c + 1]));
            }
    }
    template <KvType Type> void fill_values() const {
        for (int j = 0; j < kBlockKeys; j += 2) {
            for (int i = j; i < j + 2; ++i) prefetch(ahead.values[i], Rows<Type>::num_bytes(p.value_size));
            for (int d = 0; d < p.value_size; d += W)
                store_pairs(value_pairs() + j / 2 * p.value_size + d,
                            paired(Rows<Type>::load(block.values[j], d), Rows<Type>::load(block.values[j + 1], d)));
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

    template <int N> void score(const Lines& lines, float* scores) const {
        constexpr int V = kBlockKeys / W;
        uint32_t q[N][kMaxHeadSize / 2];
        for (int n = 0; n < N; ++n) pair_neighbours(lines.q[n], p.key_size, q[n]);
        Floats sums[N][V] = {};
        for (int d = 0; d < p.key_size / 2; ++d) {
            Pairs k[V];
            for (int i = 0; i < V; ++i) k[i] = *reinterpret_cast<const Pairs*>(key_pairs() + d * kBlockKeys + i * W);
            for (int n = 0; n < N; ++n)
                for (int i = 0; i < V; ++i) sums[n][i] = add_products(sums[n][i], k[i], q[n][d]);
        }
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < V; ++i) store(scores + n * kBlockKeys + i * W, sums[n][i]);
    }

    template <int N, int V> void weigh(const Lines& lines, const uint32_t (*weights)[kBlockKeys / 2], int channel, const float* factors) const {
        Floats sums[N][V];
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < V; ++i) sums[n][i] = load(lines.partials[n] + 2 + channel + i * W) * factors[n];
        for (int j = 0; j < kBlockKeys / 2; ++j) {
            Pairs v[V];
            for (int i = 0; i < V; ++i) v[i] = *reinterpret_cast<const Pairs*>(value_pairs() + j * p.value_size + channel + i * W);
            for (int n = 0; n < N; ++n)
                for (int i = 0; i < V; ++i) sums[n][i] = add_products(sums[n][i], v[i], weights[n][j]);
        }
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < V; ++i) store(lines.partials[n] + 2 + channel + i * W, sums[n][i]);
    }

    template <KvType Type, int N> void weigh_stored(const Lines& lines, float* scores) const {
        soften_and_weigh<N>(p, StoredValues<Type>{block, block, 0}, lines, block.count, false, scores);
    }

    template <int N> void attend(const Lines& lines, bool all_visible, float* scores) const {
        score<N>(lines, scores);
        if (!all_visible) {
            switch (p.v_type) {
                case KvType::f16: return weigh_stored<KvType::f16, N>(lines, scores);
                case KvType::q8_0: return weigh_stored<KvType::q8_0, N>(lines, scores);
                case KvType::q4_0: return weigh_stored<KvType::q4_0, N>(lines, scores);
                case KvType::f32: return weigh_stored<KvType::f32, N>(lines, scores);
            }
        }
        float factors[N];
        uint32_t weights[N][kBlockKeys / 2];
        soften<N>(p, lines, scores, factors);
        for (int n = 0; n < N; ++n) pair_neighbours(scores + n * kBlockKeys, kBlockKeys, weights[n]);
        int channel = 0;
        for (; channel + 4 * W <= p.value_size; channel += 4 * W) weigh<N, 4>(lines, weights, channel, factors);
        for (; channel < p.value_size; channel += W) weigh<N, 1>(lines, weights, channel, factors);
    }
};

}  // namespace

AttendKeys avx512_bf16_attend() { return processor_has("avx512_bf16") ? attend_blocks<RoundedBlock> : nullptr; }
#else
#include "attention_problem.h"
AttendKeys avx512_bf16_attend() { return nullptr; }
#endif

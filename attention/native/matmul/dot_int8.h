#pragma once

// Dot products of bytes, on vectors of W lanes of 32 bits. Included by the matmul kernels and compiled with their
// flags.

#include <cstdint>
#include <cstring>

#include "simd.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef uint8_t Bytes __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline Bytes load_bytes(const uint8_t* from) { return *reinterpret_cast<const Bytes*>(from); }

// Every byte, below 16, becomes the entry of the table in its place.
inline Bytes look_up(const uint8_t (&table)[16], Bytes places) {
#if VECTOR_FLOATS == 16
    return Bytes(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), __m512i(places)));
#elif VECTOR_FLOATS == 8
    return Bytes(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), __m256i(places)));
#elif defined(__aarch64__)
    return Bytes(vqtbl1q_u8(vld1q_u8(table), uint8x16_t(places)));
#else
    for (size_t i = 0; i < sizeof places; ++i) places[i] = table[places[i]];
    return places;
#endif
}

// Shifts every byte by Up bits, to the right if Up is negative. `mask` clears the bits that cross into the next byte.
template <int Up> inline Bytes shift_bytes(Bytes bytes, uint8_t mask) {
    const Shorts shorts = Shorts(bytes), result = Up >= 0 ? shorts << (Up >= 0 ? Up : 0) : shorts >> (Up < 0 ? -Up : 0);
    return Bytes(result) & (Bytes{} + mask);
}

inline int32_t load_4_bytes(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return four;
}

inline Floats to_floats(Ints value) { return __builtin_convertvector(value, Floats); }

// a * b + c, rounded once if the processor has such an instruction.
inline Floats fma(Floats a, Floats b, Floats c) {
#if VECTOR_FLOATS == 16
    return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif VECTOR_FLOATS == 8
    return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__aarch64__)
    return Floats(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
    return a * b + c;
#endif
}

inline Floats load_fp16(const uint8_t* from) {
#if VECTOR_FLOATS == 16
    return Floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif VECTOR_FLOATS == 8
    return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__aarch64__)
    return Floats(vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from))));
#else
    typedef uint16_t Few __attribute__((vector_size(2 * W), aligned(1), may_alias));
    const Ints halves = __builtin_convertvector(*reinterpret_cast<const Few*>(from), Ints), sizes = halves & 0x7fff;
    const Ints finite = Ints(Floats(sizes << 13) * 0x1p112f), endless = sizes >= 0x7c00;
    return Floats(finite | (endless & 0x7f800000) | halves >> 15 << 31);
#endif
}

// Stores integers from -128 to 127 as bytes.
inline void store_i8(int8_t* to, Ints values) {
#if VECTOR_FLOATS == 16
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(__m512i(values)));
#elif VECTOR_FLOATS == 8
    const __m256i sixteens = _mm256_packs_epi32(__m256i(values), __m256i(values)), bytes = _mm256_packs_epi16(sixteens, sixteens);
    const int32_t halves[2] = {_mm256_extract_epi32(bytes, 0), _mm256_extract_epi32(bytes, 4)};
    std::memcpy(to, halves, sizeof halves);
#else
    typedef int8_t Few __attribute__((vector_size(W), aligned(1), may_alias));
    *reinterpret_cast<Few*>(to) = __builtin_convertvector(values, Few);
#endif
}

// Adds to each lane the dot product of its four bytes of `weights` with the four signed bytes of `row`. Wide weights
// have 8 bits with an offset of 128, which is subtracted here (except for kWideOffset). Others have at most 6 bits.
template <bool Wide> inline Ints add_dots(Ints sum, Bytes weights, int32_t row) {
#if defined(LOWTIDE_VNNI512)
    return Ints(_mm512_dpbusd_epi32(__m512i(sum), __m512i(weights), _mm512_set1_epi32(row)));
#elif defined(LOWTIDE_VNNI)
    return Ints(_mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(weights), _mm256_set1_epi32(row)));
#elif VECTOR_FLOATS == 8
    __m256i unsigned_ones = __m256i(weights), signed_ones = _mm256_set1_epi32(row);
    if constexpr (Wide) {  // a pair of 8-bit products does not fit 16 bits, so the sign moves to the other factor
        const __m256i with_sign = _mm256_xor_si256(unsigned_ones, _mm256_set1_epi8(-128));
        unsigned_ones = _mm256_abs_epi8(with_sign), signed_ones = _mm256_sign_epi8(signed_ones, with_sign);
    }
    const __m256i pairs = _mm256_maddubs_epi16(unsigned_ones, signed_ones);
    return Ints(_mm256_add_epi32(__m256i(sum), _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
#elif defined(__ARM_FEATURE_DOTPROD)
    if constexpr (Wide) weights ^= uint8_t(128);
    return Ints(vdotq_s32(int32x4_t(sum), int8x16_t(weights), vreinterpretq_s8_s32(vdupq_n_s32(row))));
#elif defined(__aarch64__)
    if constexpr (Wide) weights ^= uint8_t(128);
    const int8x16_t w = int8x16_t(weights), a = vreinterpretq_s8_s32(vdupq_n_s32(row));
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(a)), high = vmull_high_s8(w, a);
    return Ints(vaddq_s32(int32x4_t(sum), vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high))));
#else
    int8_t four[4];
    std::memcpy(four, &row, sizeof four);
    for (int j = 0; j < 4; ++j) {
        const Ints byte = Ints(weights) >> 8 * j & 255;
        sum += (Wide ? byte - 128 : byte) * int32_t(four[j]);
    }
    return sum;
#endif
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define LOWTIDE_I8MM
// Sums of four lanes of weights with two rows, in the layout of vmmla: each vector has two lanes of both rows.
class RowPair {
public:
    explicit RowPair(const Ints (&sums)[2])
        : low_(vzip1q_s32(int32x4_t(sums[0]), int32x4_t(sums[1]))), high_(vzip2q_s32(int32x4_t(sums[0]), int32x4_t(sums[1]))) {}

    // Adds the products of two groups of four columns, one after the other, with eight bytes of each row. See
    // `add_dots`.
    template <bool Wide> void add(Bytes first, Bytes second, const int8_t* row, const int8_t* next_row) {
        if constexpr (Wide) first ^= uint8_t(128), second ^= uint8_t(128);
        const int32x4_t left = int32x4_t(first), right = int32x4_t(second);
        const int8x16_t rows = vcombine_s8(vld1_s8(row), vld1_s8(next_row));
        low_ = vmmlaq_s32(low_, int8x16_t(vzip1q_s32(left, right)), rows);
        high_ = vmmlaq_s32(high_, int8x16_t(vzip2q_s32(left, right)), rows);
    }

    void store(Ints (&sums)[2]) const { sums[0] = Ints(vuzp1q_s32(low_, high_)), sums[1] = Ints(vuzp2q_s32(low_, high_)); }

private:
    int32x4_t low_, high_;
};
#endif

// The part of a wide weight's offset that `add_dots` does not subtract.
#if defined(LOWTIDE_VNNI512) || defined(LOWTIDE_VNNI)
constexpr int kWideOffset = 128;
#else
constexpr int kWideOffset = 0;
#endif

}  // namespace

#pragma once

// Vectors of VECTOR_FLOATS lanes in the vector extension of GCC and clang: the same lines become AVX-512, AVX2, SSE2
// or NEON, by the flags of the file that includes them. A kernel defines VECTOR_FLOATS before it includes this; other
// code gets 4.
//
// Everything is in an anonymous namespace: each file keeps its own copy, so the linker never uses an AVX-512 copy
// elsewhere.

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef VECTOR_FLOATS
#define VECTOR_FLOATS 4
#endif

// fp16 and bfloat16 to float32 and back.

namespace {

inline float fp16_to_float(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7fff;
    uint32_t bits;
    if (magnitude >= 0x7c00) {
        bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    } else if (magnitude >= 0x400) {
        bits = sign | (magnitude + 0x1c000) << 13;
    } else {  // zero and subnormals: a multiple of 2^-24
        const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &value, sizeof bits);
        bits |= sign;
    }
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
#endif
}

// A bfloat16 is the upper half of a float32.
inline float bf16_to_float(uint16_t upper) {
    const uint32_t bits = uint32_t(upper) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Rounds to the nearest fp16, ties to even. Values beyond the largest fp16 become infinity.
inline uint16_t float_to_fp16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) return sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (magnitude < 0x38800000) {  // zero and subnormals: the last bits of the sum are a multiple of 2^-24
        float shifted;
        std::memcpy(&shifted, &magnitude, sizeof shifted);
        shifted += 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &shifted, sizeof rounded);
        return sign | uint16_t(rounded - 0x3f000000);
    }
    return sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// Vectors of floats and of 32-bit integers.

constexpr int W = VECTOR_FLOATS;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
inline Floats splat(float value) { return value - Floats{}; }

// value * 2^n for a whole number n >= -126; undefined for others. Only vectors of 16 lanes accept an n that no
// integer holds.
inline Floats times_power_of_two(Floats value, Floats n) {
#if VECTOR_FLOATS == 16
    return Floats(_mm512_scalef_ps(__m512(value), __m512(n)));
#else
    const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats power;
    std::memcpy(&power, &exponent, sizeof power);
    return value * power;
#endif
}

// exp(x) for x <= 0: 2^n times a polynomial on [-ln2/2, ln2/2] with Cephes' coefficients, within 2 units in the last
// place. It is exactly 0 below -87 and for NaN.
inline Floats exp_nonpositive(Floats x) {
    const Ints alive = x > splat(-87.0f);
    if constexpr (W != 16) x = alive ? x : splat(-87.0f);
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
    return alive ? times_power_of_two(y, n) : splat(0.0f);
}

inline float exp_one(float x) {
    float lane[W];
    store(lane, exp_nonpositive(splat(x)));
    return lane[0];
}

template <class Order, int... I> inline Floats shuffled(Floats a, Floats b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Order::lane(I)...);
#else
    return __builtin_shuffle(a, b, Ints{Order::lane(I)...});
#endif
}

// Lane i is lane Order::lane(i) of `a`, or from W on of `b`.
template <class Order> inline Floats shuffle(Floats a, Floats b) {
    return shuffled<Order>(a, b, std::make_integer_sequence<int, W>());
}

template <int Step> struct MovedDown {
    static constexpr int lane(int i) { return (i + Step) % W; }
};

// Shifts lanes down by Step, for sums and maxima across lanes. The lanes that enter at the top are not used.
template <int Step> inline Floats moved_down(Floats value) { return shuffle<MovedDown<Step>>(value, value); }

template <int Step = W / 2> inline float sum_of_lanes(Floats value) {
    value += moved_down<Step>(value);
    if constexpr (Step > 1) return sum_of_lanes<Step / 2>(value);
    return value[0];
}

// Skips NaN where it can: a comparison with NaN is false.
template <int Step = W / 2> inline float largest_of_lanes(Floats value) {
    const Floats other = moved_down<Step>(value);
    value = other > value ? other : value;
    if constexpr (Step > 1) return largest_of_lanes<Step / 2>(value);
    return value[0];
}

// The lanes from First on of two vectors in turn.
template <int First> struct Interleaved {
    static constexpr int lane(int i) { return First + i % 2 * W + i / 2; }
};

// Transposes W vectors of W lanes: lane i of vector j becomes lane j of vector i.
[[gnu::always_inline]] inline void transpose(Floats (&rows)[W]) {
    for (int step = 1; step < W; step *= 2) {
        Floats next[W];
        for (int i = 0; i < W / 2; ++i) {
            next[2 * i] = shuffle<Interleaved<0>>(rows[i], rows[i + W / 2]);
            next[2 * i + 1] = shuffle<Interleaved<W / 2>>(rows[i], rows[i + W / 2]);
        }
        for (int i = 0; i < W; ++i) rows[i] = next[i];
    }
}

// A quad is four neighbouring lanes.
constexpr int kQuads = W / 4;

// The quads From of two vectors, which are numbered from 0 to 2 kQuads - 1.
template <int... From> struct Quads {
    static constexpr int lane(int i) {
        constexpr int from[] = {From...};
        return from[i / 4] * 4 + i % 4;
    }
};

// Quads A0 and A1 of `a` and B0 and B1 of `b`, for vectors of four quads.
template <int A0, int A1, int B0, int B1> inline Floats quads_of(Floats a, Floats b) {
    return shuffle<Quads<A0, A1, kQuads + B0, kQuads + B1>>(a, b);
}

// Transposes kQuads vectors of kQuads quads: quad i of vector j becomes quad j of vector i.
[[gnu::always_inline]] inline void transpose_quads([[maybe_unused]] Floats (&rows)[kQuads]) {
#if VECTOR_FLOATS == 16
    const Floats a = quads_of<0, 1, 0, 1>(rows[0], rows[1]), b = quads_of<2, 3, 2, 3>(rows[0], rows[1]);
    const Floats c = quads_of<0, 1, 0, 1>(rows[2], rows[3]), d = quads_of<2, 3, 2, 3>(rows[2], rows[3]);
    rows[0] = quads_of<0, 2, 0, 2>(a, c), rows[1] = quads_of<1, 3, 1, 3>(a, c);
    rows[2] = quads_of<0, 2, 0, 2>(b, d), rows[3] = quads_of<1, 3, 1, 3>(b, d);
#elif VECTOR_FLOATS == 8
    const Floats a = rows[0], b = rows[1];
    rows[0] = shuffle<Quads<0, 2>>(a, b), rows[1] = shuffle<Quads<1, 3>>(a, b);
#endif
}

// The four floats at `from` in every quad.
inline Floats in_every_quad(const float* from) {
#if VECTOR_FLOATS == 16
    return Floats(_mm512_broadcast_f32x4(_mm_loadu_ps(from)));
#elif VECTOR_FLOATS == 8
    return Floats(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from)));
#else
    return load(from);
#endif
}

// In each quad: two lanes from First on of each vector in turn.
template <int First> struct InterleavedInQuads {
    static constexpr int lane(int i) { return i / 4 * 4 + First + i % 4 / 2 + i % 2 * W; }
};

// In each quad: the lanes First and First + 1 of `a`, then those of `b`.
template <int First> struct HalvesOfQuads {
    static constexpr int lane(int i) { return i / 4 * 4 + First + i % 2 + i % 4 / 2 * W; }
};

// Sums each quad of four vectors: lane 4 i + g of the result is the sum of quad i of vector g.
inline Floats sums_of_quads(Floats a, Floats b, Floats c, Floats d) {
    const Floats ab_low = shuffle<InterleavedInQuads<0>>(a, b), ab_high = shuffle<InterleavedInQuads<2>>(a, b);
    const Floats cd_low = shuffle<InterleavedInQuads<0>>(c, d), cd_high = shuffle<InterleavedInQuads<2>>(c, d);
    const Floats first = shuffle<HalvesOfQuads<0>>(ab_low, cd_low), second = shuffle<HalvesOfQuads<2>>(ab_low, cd_low);
    const Floats third = shuffle<HalvesOfQuads<0>>(ab_high, cd_high);
    const Floats fourth = shuffle<HalvesOfQuads<2>>(ab_high, cd_high);
    return ((first + second) + third) + fourth;
}

// W bytes as a vector of integers. GCC converts lane by lane in __builtin_convertvector; the processor has one
// instruction for all of them.

inline Ints load_u8(const uint8_t* from) {
#if VECTOR_FLOATS == 16
    return Ints(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif VECTOR_FLOATS == 8
    return Ints(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(__aarch64__)
    uint32_t four;
    std::memcpy(&four, from, sizeof four);
    return Ints(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
#else
    typedef uint8_t Few __attribute__((vector_size(W), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Few*>(from), Ints);
#endif
}

// The same for signed bytes.
inline Ints load_i8(const uint8_t* from) { return load_u8(from) << 24 >> 24; }

}  // namespace

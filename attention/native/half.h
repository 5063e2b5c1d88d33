#pragma once

// Half-precision and block-quantised rows to f32. Included by the kernels, compiled with their flags.

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

inline float half_to_float(uint16_t half) {
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
}

inline void halves_to_floats(const uint16_t* from, int count, float* to) {
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#elif defined(__aarch64__)
    for (; i + 4 <= count; i += 4)
        vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
#endif
    for (; i < count; ++i) to[i] = half_to_float(from[i]);
}

constexpr int kQuantisedBlock = 32;

// ggml's q8_0: a half-precision scale, then 32 signed bytes.
inline void q8_0_to_floats(const char* row, int count, float* to) {
    for (int i = 0; i < count; i += kQuantisedBlock, row += 34) {
        uint16_t half;
        std::memcpy(&half, row, sizeof half);
        const float scale = half_to_float(half);
        for (int j = 0; j < kQuantisedBlock; ++j)
            to[i + j] = scale * static_cast<float>(static_cast<int8_t>(row[2 + j]));
    }
}

// ggml's q4_0: a half-precision scale, then 16 bytes whose low halves are the first 16 elements.
inline void q4_0_to_floats(const char* row, int count, float* to) {
    for (int i = 0; i < count; i += kQuantisedBlock, row += 18) {
        uint16_t half;
        std::memcpy(&half, row, sizeof half);
        const float scale = half_to_float(half);
        for (int j = 0; j < kQuantisedBlock / 2; ++j) {
            const int pair = static_cast<uint8_t>(row[2 + j]);
            to[i + j] = scale * static_cast<float>((pair & 15) - 8);
            to[i + j + 16] = scale * static_cast<float>((pair >> 4) - 8);
        }
    }
}

}  // namespace

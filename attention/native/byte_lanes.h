#pragma once

// W bytes as a vector of whole numbers. GCC makes a step a lane of __builtin_convertvector there: the processor has one
// instruction for all. Included by the kernels, compiled with their flags.

#include <cstdint>
#include <cstring>

#include "vectors.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

inline Ints load_small(const uint8_t* from) {
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

// The same of bytes that have a sign.
inline Ints load_small_signed(const uint8_t* from) { return load_small(from) << 24 >> 24; }

}  // namespace

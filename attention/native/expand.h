#pragma once

// Lanes moved apart: the first of a vector go, in order, to the lanes whose bits are set, the others become 0. Only
// where there are instructions for it. Included by the kernels.

#include <cstdint>

#include "vectors.h"

namespace {

#if VECTOR_FLOATS == 16 && defined(__AVX512F__)
#define LOWTIDE_CAN_EXPAND 1

inline Floats expanded(uint64_t bits, Floats values) { return Floats(_mm512_maskz_expand_ps(__mmask16(bits), __m512(values))); }

#elif VECTOR_FLOATS == 8 && defined(__AVX2__)
#define LOWTIDE_CAN_EXPAND 1

// Of each choice of lanes, how many set ones lie before each.
struct Ranks {
    uint8_t of_bits[256][8];
    constexpr Ranks() : of_bits() {
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, rank = 0; lane < 8; ++lane) {
                of_bits[bits][lane] = uint8_t(rank);
                rank += bits >> lane & 1;
            }
    }
};

inline Floats expanded(uint64_t bits, Floats values) {
    static constexpr Ranks kRanks;
    const auto* ranks = reinterpret_cast<const __m128i*>(kRanks.of_bits[bits & 255]);
    const Floats moved = Floats(_mm256_permutevar8x32_ps(__m256(values), _mm256_cvtepu8_epi32(_mm_loadl_epi64(ranks))));
    const Ints lanes = {1, 2, 4, 8, 16, 32, 64, 128};
    const Ints set = (Ints{} + int32_t(bits & 255)) & lanes;
    return set != 0 ? moved : splat(0.0f);
}

#endif

}  // namespace

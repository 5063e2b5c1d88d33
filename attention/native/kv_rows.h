#pragma once

// Rows of the KV cache as they are stored, W channels at a time as floats. Included by the kernels.

#include <cstdint>
#include <cstring>

#include "attention_problem.h"
#include "byte_lanes.h"
#include "half.h"
#include "vectors.h"

namespace {

constexpr int kQuantisedBlock = 32;

inline float half_at(const char* from) {
    uint16_t half;
    std::memcpy(&half, from, sizeof half);
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    return half_to_float(half);
#endif
}

template <KvType Type> struct Rows;

template <> struct Rows<KvType::f16> {
    static size_t num_bytes(int size) { return stored_bytes(KvType::f16, size); }
    static Floats load(const char* row, int channel) {
        const auto* halves = reinterpret_cast<const uint16_t*>(row) + channel;
#if VECTOR_FLOATS == 16 && defined(__AVX512F__)
        return Floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves))));
#elif VECTOR_FLOATS == 8 && defined(__F16C__)
        return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves))));
#elif VECTOR_FLOATS == 4 && defined(__aarch64__)
        return Floats(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves))));
#else
        Floats floats;
        for (int i = 0; i < W; ++i) floats[i] = half_to_float(halves[i]);
        return floats;
#endif
    }
};

template <> struct Rows<KvType::f32> {
    static size_t num_bytes(int size) { return stored_bytes(KvType::f32, size); }
    static Floats load(const char* row, int channel) {
        Floats floats;
        std::memcpy(&floats, row + 4 * size_t(channel), sizeof floats);
        return floats;
    }
};

// ggml's q8_0: a half-precision scale, then 32 signed bytes.
template <> struct Rows<KvType::q8_0> {
    static size_t num_bytes(int size) { return stored_bytes(KvType::q8_0, size); }
    static Floats load(const char* row, int channel) {
        const char* block = row + channel / kQuantisedBlock * 34;
        const auto* codes = reinterpret_cast<const uint8_t*>(block + 2 + channel % kQuantisedBlock);
        return half_at(block) * __builtin_convertvector(load_small_signed(codes), Floats);
    }
};

// ggml's q4_0: a half-precision scale, then 16 bytes whose low halves are the first 16 elements.
template <> struct Rows<KvType::q4_0> {
    static size_t num_bytes(int size) { return stored_bytes(KvType::q4_0, size); }
    static Floats load(const char* row, int channel) {
        const char* block = row + channel / kQuantisedBlock * 18;
        const Ints pairs = load_small(reinterpret_cast<const uint8_t*>(block + 2 + channel % 16));
        const Ints codes = channel % kQuantisedBlock < 16 ? pairs & 15 : pairs >> 4;
        return half_at(block) * (__builtin_convertvector(codes, Floats) - 8.0f);
    }
};

}  // namespace

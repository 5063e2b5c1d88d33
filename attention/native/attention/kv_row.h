#pragma once

// Reads a row of the KV cache (one head's key or value of one token) in any of its storage types. Included by the
// kernels and compiled with their flags.

#include <cstdint>
#include <cstring>

#include "attention/problem.h"
#include "simd.h"

// W channels of a row as floats, from `channel` on.

namespace {

constexpr int kQuantisedBlock = 32;

inline float load_fp16(const char* from) {
    uint16_t half;
    std::memcpy(&half, from, sizeof half);
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    return fp16_to_float(half);
#endif
}

template <KvType Type> struct KvRow;

template <> struct KvRow<KvType::f16> {
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
        for (int i = 0; i < W; ++i) floats[i] = fp16_to_float(halves[i]);
        return floats;
#endif
    }
};

template <> struct KvRow<KvType::f32> {
    static size_t num_bytes(int size) { return stored_bytes(KvType::f32, size); }
    static Floats load(const char* row, int channel) {
        Floats floats;
        std::memcpy(&floats, row + 4 * size_t(channel), sizeof floats);
        return floats;
    }
};

// ggml's q8_0: an fp16 scale, then 32 signed bytes.
template <> struct KvRow<KvType::q8_0> {
    static size_t num_bytes(int size) { return stored_bytes(KvType::q8_0, size); }
    static Floats load(const char* row, int channel) {
        const char* block = row + channel / kQuantisedBlock * 34;
        const auto* codes = reinterpret_cast<const uint8_t*>(block + 2 + channel % kQuantisedBlock);
        return load_fp16(block) * __builtin_convertvector(load_i8(codes), Floats);
    }
};

// ggml's q4_0: an fp16 scale, then 16 bytes. Their lower four bits are the first 16 elements.
template <> struct KvRow<KvType::q4_0> {
    static size_t num_bytes(int size) { return stored_bytes(KvType::q4_0, size); }
    static Floats load(const char* row, int channel) {
        const char* block = row + channel / kQuantisedBlock * 18;
        const Ints pairs = load_u8(reinterpret_cast<const uint8_t*>(block + 2 + channel % 16));
        const Ints codes = channel % kQuantisedBlock < 16 ? pairs & 15 : pairs >> 4;
        return load_fp16(block) * (__builtin_convertvector(codes, Floats) - 8.0f);
    }
};

// A whole row, for code outside of the kernels.

template <KvType Type> void row_to_fp16(const char* row, int size, uint16_t* to) {
    if constexpr (Type == KvType::f16) {
        std::memcpy(to, row, sizeof(uint16_t) * size);
    } else {
        for (int d = 0; d < size; d += W) {
            const Floats floats = KvRow<Type>::load(row, d);
            for (int lane = 0; lane < W; ++lane) to[d + lane] = float_to_fp16(floats[lane]);
        }
    }
}

inline void row_to_fp16(KvType type, const char* row, int size, uint16_t* to) {
    switch (type) {
        case KvType::f16: return row_to_fp16<KvType::f16>(row, size, to);
        case KvType::q8_0: return row_to_fp16<KvType::q8_0>(row, size, to);
        case KvType::q4_0: return row_to_fp16<KvType::q4_0>(row, size, to);
        case KvType::f32: return row_to_fp16<KvType::f32>(row, size, to);
    }
}

template <KvType Type> void row_to_float(const char* row, int size, float* to) {
    for (int d = 0; d < size; d += W) store(to + d, KvRow<Type>::load(row, d));
}

inline void row_to_float(KvType type, const char* row, int size, float* to) {
    switch (type) {
        case KvType::f16: return row_to_float<KvType::f16>(row, size, to);
        case KvType::q8_0: return row_to_float<KvType::q8_0>(row, size, to);
        case KvType::q4_0: return row_to_float<KvType::q4_0>(row, size, to);
        case KvType::f32: return row_to_float<KvType::f32>(row, size, to);
    }
}

}  // namespace

#pragma once

// Rows of the KV cache, of any type, as halves or floats. For what is done with them outside the kernels.

#ifndef VECTOR_FLOATS
#define VECTOR_FLOATS 4
#endif
#include "kv_rows.h"

namespace {

template <KvType Type> void copy_row(const char* row, int size, uint16_t* to) {
    if constexpr (Type == KvType::f16) {
        std::memcpy(to, row, sizeof(uint16_t) * size);
    } else {
        for (int d = 0; d < size; d += W) {
            const Floats floats = Rows<Type>::load(row, d);
            for (int lane = 0; lane < W; ++lane) to[d + lane] = float_to_half(floats[lane]);
        }
    }
}

inline void copy_row(KvType type, const char* row, int size, uint16_t* to) {
    switch (type) {
        case KvType::f16: return copy_row<KvType::f16>(row, size, to);
        case KvType::q8_0: return copy_row<KvType::q8_0>(row, size, to);
        case KvType::q4_0: return copy_row<KvType::q4_0>(row, size, to);
        case KvType::f32: return copy_row<KvType::f32>(row, size, to);
    }
}

template <KvType Type> void read_row(const char* row, int size, float* to) {
    for (int d = 0; d < size; d += W) store(to + d, Rows<Type>::load(row, d));
}

inline void read_row(KvType type, const char* row, int size, float* to) {
    switch (type) {
        case KvType::f16: return read_row<KvType::f16>(row, size, to);
        case KvType::q8_0: return read_row<KvType::q8_0>(row, size, to);
        case KvType::q4_0: return read_row<KvType::q4_0>(row, size, to);
        case KvType::f32: return read_row<KvType::f32>(row, size, to);
    }
}

}  // namespace

// The attention kernel in AVX-512.

#if defined(__AVX512F__)
#define VECTOR_FLOATS 16
#include "attention/flash.inl"
const AttentionKernels* avx512_attention_kernels() {
    static const AttentionKernels kernels = {"avx512", attend_blocks<ConvertedBlock>, add_weights, avx512_bf16_attend_keys()};
    return &kernels;
}
#else
#include "attention/problem.h"
const AttentionKernels* avx512_attention_kernels() { return nullptr; }
#endif

// The attention kernel in AVX2.

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VECTOR_FLOATS 8
#include "attention/flash.inl"
const AttentionKernels* avx2_attention_kernels() {
    static const AttentionKernels kernels = {"avx2", attend_blocks<ConvertedBlock>, add_weights, nullptr};
    return &kernels;
}
#else
#include "attention/problem.h"
const AttentionKernels* avx2_attention_kernels() { return nullptr; }
#endif

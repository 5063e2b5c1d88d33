#if defined(__AVX512F__)
#define VECTOR_FLOATS 16
#include "attend_keys.inl"
#include "add_weights.inl"
const KernelSet* avx512_kernels() {
    static const KernelSet kernels = {"avx512", attend_blocks<ConvertedBlock>, add_weights, avx512_bf16_attend()};
    return &kernels;
}
#else
#include "attention_problem.h"
const KernelSet* avx512_kernels() { return nullptr; }
#endif

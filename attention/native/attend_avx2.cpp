#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VECTOR_FLOATS 8
#include "attend_keys.inl"
#include "add_weights.inl"
const KernelSet* avx2_kernels() {
    static const KernelSet kernels = {"avx2", attend_blocks<ConvertedBlock>, add_weights, nullptr};
    return &kernels;
}
#else
#include "attention_problem.h"
const KernelSet* avx2_kernels() { return nullptr; }
#endif

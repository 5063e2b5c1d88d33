// The attention kernel for any processor. Four lanes: SSE2 on x86-64, NEON on 64-bit Arm. Every processor of the kind has them.
#define VECTOR_FLOATS 4
#include "attention/flash.inl"
const AttentionKernels* portable_attention_kernels() {
#if defined(__aarch64__)
    static const AttentionKernels kernels = {"neon", attend_blocks<ConvertedBlock>, add_weights, nullptr};
#else
    static const AttentionKernels kernels = {"portable", attend_blocks<ConvertedBlock>, add_weights, nullptr};
#endif
    return &kernels;
}

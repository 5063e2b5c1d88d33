// Four lanes: SSE2 on x86-64 and NEON on 64-bit Arm, which every processor of its kind has.
#define VECTOR_FLOATS 4
#include "attend_keys.inl"
#include "add_weights.inl"
const KernelSet* portable_kernels() {
#if defined(__aarch64__)
    static const KernelSet kernels = {"neon", attend_blocks<ConvertedBlock>, add_weights, nullptr};
#else
    static const KernelSet kernels = {"portable", attend_blocks<ConvertedBlock>, add_weights, nullptr};
#endif
    return &kernels;
}

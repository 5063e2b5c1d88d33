// The matmul kernels for any processor. Four lanes: SSE2 on x86-64, NEON on 64-bit Arm. Every processor of the kind has them.
#define VECTOR_FLOATS 4
#include "matmul/gemm_int8.inl"
#include "matmul/gemm_float.inl"
const MatmulKernels* portable_matmul_kernels() {
#if defined(__aarch64__)
    static const MatmulKernels kernels = {"neon", quantise, multiply, multiply_float};
#else
    static const MatmulKernels kernels = {"portable", quantise, multiply, multiply_float};
#endif
    return &kernels;
}

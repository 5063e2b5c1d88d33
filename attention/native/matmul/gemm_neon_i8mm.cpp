// The matmul kernels in NEON with matrix multiplications of int8 (FEAT_I8MM).

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define VECTOR_FLOATS 4
#include "matmul/gemm_int8.inl"
#include "matmul/gemm_float.inl"
const MatmulKernels* i8mm_matmul_kernels() {
    static const MatmulKernels kernels = {"neon-i8mm", quantise, multiply, multiply_float};
    return &kernels;
}
#else
#include "matmul/kernels.h"
const MatmulKernels* i8mm_matmul_kernels() { return nullptr; }
#endif

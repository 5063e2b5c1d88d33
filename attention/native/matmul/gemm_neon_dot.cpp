// The matmul kernels in NEON with dot products (FEAT_DotProd).

#if defined(__ARM_FEATURE_DOTPROD)
#define VECTOR_FLOATS 4
#include "matmul/gemm_int8.inl"
#include "matmul/gemm_float.inl"
const MatmulKernels* dot_matmul_kernels() {
    static const MatmulKernels kernels = {"neon-dot", quantise, multiply, multiply_float};
    return &kernels;
}
#else
#include "matmul/kernels.h"
const MatmulKernels* dot_matmul_kernels() { return nullptr; }
#endif

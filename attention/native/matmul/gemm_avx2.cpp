// The matmul kernels in AVX2.

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VECTOR_FLOATS 8
#include "matmul/gemm_int8.inl"
#include "matmul/gemm_float.inl"
const MatmulKernels* avx2_matmul_kernels() {
    static const MatmulKernels kernels = {"avx2", quantise, multiply, multiply_float};
    return &kernels;
}
#else
#include "matmul/kernels.h"
const MatmulKernels* avx2_matmul_kernels() { return nullptr; }
#endif

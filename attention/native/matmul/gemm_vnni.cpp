// The matmul kernels in AVX2 with AVX-VNNI.

#if defined(__AVXVNNI__) && defined(__FMA__) && defined(__F16C__)
#define VECTOR_FLOATS 8
#define LOWTIDE_VNNI
#include "matmul/gemm_int8.inl"
#include "matmul/gemm_float.inl"
const MatmulKernels* vnni_matmul_kernels() {
    static const MatmulKernels kernels = {"avx-vnni", quantise, multiply, multiply_float};
    return &kernels;
}
#else
#include "matmul/kernels.h"
const MatmulKernels* vnni_matmul_kernels() { return nullptr; }
#endif

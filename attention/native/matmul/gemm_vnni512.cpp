// The matmul kernels in AVX-512 with VNNI.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define VECTOR_FLOATS 16
#define LOWTIDE_VNNI512
#include "matmul/gemm_int8.inl"
#include "matmul/gemm_float.inl"
const MatmulKernels* vnni512_matmul_kernels() {
    static const MatmulKernels kernels = {"avx512-vnni", quantise, multiply, multiply_float};
    return &kernels;
}
#else
#include "matmul/kernels.h"
const MatmulKernels* vnni512_matmul_kernels() { return nullptr; }
#endif

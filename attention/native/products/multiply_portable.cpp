// Four lanes: SSE2 on x86-64 and NEON on 64-bit Arm, which every processor of its kind has.
#define VECTOR_FLOATS 4
#include "multiply.inl"
#include "multiply_floats.inl"
const ProductKernels* portable_products() {
#if defined(__aarch64__)
    static const ProductKernels kernels = {"neon", quantise, multiply, multiply_floats};
#else
    static const ProductKernels kernels = {"portable", quantise, multiply, multiply_floats};
#endif
    return &kernels;
}

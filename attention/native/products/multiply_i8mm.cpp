#if defined(__ARM_FEATURE_MATMUL_INT8)
#define VECTOR_FLOATS 4
#include "multiply.inl"
#include "multiply_floats.inl"
const ProductKernels* i8mm_products() {
    static const ProductKernels kernels = {"neon-i8mm", quantise, multiply, multiply_floats};
    return &kernels;
}
#else
#include "products.h"
const ProductKernels* i8mm_products() { return nullptr; }
#endif

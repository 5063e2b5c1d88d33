#if defined(__ARM_FEATURE_DOTPROD)
#define VECTOR_FLOATS 4
#include "multiply.inl"
#include "multiply_floats.inl"
const ProductKernels* dot_products() {
    static const ProductKernels kernels = {"neon-dot", quantise, multiply, multiply_floats};
    return &kernels;
}
#else
#include "products.h"
const ProductKernels* dot_products() { return nullptr; }
#endif

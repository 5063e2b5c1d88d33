#if defined(__ARM_FEATURE_DOTPROD)
#define VECTOR_FLOATS 4
#include "multiply.inl"
const ProductKernels* dot_products() {
    static const ProductKernels kernels = {"neon-dot", quantise, multiply};
    return &kernels;
}
#else
#include "products.h"
const ProductKernels* dot_products() { return nullptr; }
#endif

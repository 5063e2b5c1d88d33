#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VECTOR_FLOATS 8
#include "multiply.inl"
#include "multiply_floats.inl"
const ProductKernels* avx2_products() {
    static const ProductKernels kernels = {"avx2", quantise, multiply, multiply_floats};
    return &kernels;
}
#else
#include "products.h"
const ProductKernels* avx2_products() { return nullptr; }
#endif

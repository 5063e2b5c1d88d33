#if defined(__AVXVNNI__) && defined(__FMA__) && defined(__F16C__)
#define VECTOR_FLOATS 8
#define LOWTIDE_VNNI
#include "multiply.inl"
#include "multiply_floats.inl"
const ProductKernels* vnni_products() {
    static const ProductKernels kernels = {"avx-vnni", quantise, multiply, multiply_floats};
    return &kernels;
}
#else
#include "products.h"
const ProductKernels* vnni_products() { return nullptr; }
#endif

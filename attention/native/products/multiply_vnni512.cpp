#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define VECTOR_FLOATS 16
#define LOWTIDE_VNNI512
#include "multiply.inl"
#include "multiply_floats.inl"
const ProductKernels* vnni512_products() {
    static const ProductKernels kernels = {"avx512-vnni", quantise, multiply, multiply_floats};
    return &kernels;
}
#else
#include "products.h"
const ProductKernels* vnni512_products() { return nullptr; }
#endif

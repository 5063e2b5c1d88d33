// Chooses the product kernels by what the processor can do.

#include <cstring>

#include "cpu_features.h"
#include "products.h"

const ProductKernels* find_product_kernels(const char* name) {
    const bool avx512 = processor_has("avx512f") && processor_has("avx512bw") && processor_has("avx512vl");
    const bool avx2 = processor_has("avx2") && processor_has("fma") && processor_has("f16c");
    const ProductKernels* const usable[] = {
        avx512 && processor_has("avx512_vnni") ? vnni512_products() : nullptr,
        avx2 && processor_has("avx_vnni") ? vnni_products() : nullptr,
        avx2 ? avx2_products() : nullptr,
        processor_has("i8mm") ? i8mm_products() : nullptr,
        processor_has("dotprod") ? dot_products() : nullptr,
        portable_products(),
    };
    for (const ProductKernels* kernels : usable)
        if (kernels != nullptr && (name == nullptr || std::strcmp(name, kernels->name) == 0)) return kernels;
    return nullptr;
}

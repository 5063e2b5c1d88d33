// Chooses a kernel set by what the processor can do.

#include <cstring>

#include "attention_problem.h"
#include "cpu_features.h"

const KernelSet* find_kernels(const char* name) {
    const bool avx512 = processor_has("avx512f") && processor_has("avx512bw") && processor_has("avx512vl");
    const KernelSet* const usable[] = {
        avx512 ? avx512_kernels() : nullptr,
        processor_has("avx2") && processor_has("fma") && processor_has("f16c") ? avx2_kernels() : nullptr,
        portable_kernels(),
    };
    for (const KernelSet* kernels : usable)
        if (kernels != nullptr && (name == nullptr || std::strcmp(name, kernels->name) == 0)) return kernels;
    return nullptr;
}

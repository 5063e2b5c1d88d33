// Chooses a kernel set by what the processor can do.

#include <cstring>
#include <string>

#include "attention_problem.h"
#include "cpu_features.h"

namespace {

bool processor_has(const char* wanted) {
    std::string names(lowtide_cpu_features(nullptr, 0) + 1, '\0');
    lowtide_cpu_features(&names[0], names.size());
    const std::string all = " " + std::string(names.c_str()) + " ";
    return all.find(" " + std::string(wanted) + " ") != std::string::npos;
}

}  // namespace

const KernelSet* find_kernels(const char* name) {
    const KernelSet* const usable[] = {
        processor_has("avx512f") ? avx512_kernels() : nullptr,
        processor_has("avx2") && processor_has("fma") && processor_has("f16c") ? avx2_kernels() : nullptr,
        portable_kernels(),
    };
    for (const KernelSet* kernels : usable)
        if (kernels != nullptr && (name == nullptr || std::strcmp(name, kernels->name) == 0)) return kernels;
    return nullptr;
}

// Reads the processor's features. The dispatch of kernels is in attention/flash.cpp and matmul/matmul.cpp.

#include "cpu.h"

#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(_WIN32)
#include <windows.h>
#endif

namespace {

struct Feature {
    const char* name;
    bool present;
};

// Writes the names of the present features, separated by spaces, into `out` of `capacity` bytes. Returns the length
// that is needed without the terminator; `out` always has one.
size_t join(const Feature* features, size_t num_features, char* out, size_t capacity) {
    size_t length = 0;
    if (capacity > 0) out[0] = '\0';
    for (size_t i = 0; i < num_features; ++i) {
        if (!features[i].present) continue;
        const size_t name_length = std::strlen(features[i].name);
        const size_t separator = length > 0 ? 1 : 0;
        if (length + separator + name_length < capacity) {
            if (separator != 0) out[length] = ' ';
            std::memcpy(out + length + separator, features[i].name, name_length + 1);
        }
        length += separator + name_length;
    }
    return length;
}

#if defined(__x86_64__)
// The operating system must save the wide registers too: XCR0 tells.
unsigned long long enabled_register_state() {
    unsigned eax = 0, edx = 0;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (static_cast<unsigned long long>(edx) << 32) | eax;
}

size_t list_features(char* out, size_t capacity) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    unsigned leaf1_c = 0, leaf7_b = 0, leaf7_c = 0, leaf7_1_a = 0;
    if (__get_cpuid(1, &a, &b, &c, &d)) leaf1_c = c;
    unsigned num_subleaves = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        num_subleaves = a;
        leaf7_b = b;
        leaf7_c = c;
    }
    if (num_subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) leaf7_1_a = a;

    const bool saves_registers = (leaf1_c >> 27) & 1;
    const unsigned long long state = saves_registers ? enabled_register_state() : 0;
    const bool ymm = (state & 0x6) == 0x6;
    const bool zmm = (state & 0xe6) == 0xe6;
    const bool avx512 = zmm && ((leaf7_b >> 16) & 1);
    const Feature features[] = {
        {"avx2", ymm && ((leaf7_b >> 5) & 1)},
        {"fma", ymm && ((leaf1_c >> 12) & 1)},
        {"f16c", ymm && ((leaf1_c >> 29) & 1)},
        {"avx_vnni", ymm && ((leaf7_1_a >> 4) & 1)},
        {"avx512f", avx512},
        {"avx512bw", avx512 && ((leaf7_b >> 30) & 1)},
        {"avx512vl", avx512 && ((leaf7_b >> 31) & 1)},
        {"avx512_vnni", avx512 && ((leaf7_c >> 11) & 1)},
        {"avx512_bf16", avx512 && ((leaf7_1_a >> 5) & 1)},
    };
    return join(features, sizeof(features) / sizeof(features[0]), out, capacity);
}
#elif defined(__aarch64__)
#if defined(__APPLE__)
bool system_has(const char* name) {
    int value = 0;
    size_t num_bytes = sizeof value;
    return sysctlbyname(name, &value, &num_bytes, nullptr, 0) == 0 && value != 0;
}
#elif defined(_WIN32)
constexpr DWORD kDotProduct = 43;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE; Windows names no other that is used here
#endif

size_t list_features(char* out, size_t capacity) {
#if defined(__linux__)
    const unsigned long caps = getauxval(AT_HWCAP);
    const unsigned long caps2 = getauxval(AT_HWCAP2);
    const Feature features[] = {
        {"neon", true},
        {"dotprod", (caps & HWCAP_ASIMDDP) != 0},
        {"fp16", (caps & HWCAP_ASIMDHP) != 0},
        {"sve", (caps & HWCAP_SVE) != 0},
        {"i8mm", (caps2 & HWCAP2_I8MM) != 0},
        {"bf16", (caps2 & HWCAP2_BF16) != 0},
    };
#elif defined(__APPLE__)
    const Feature features[] = {
        {"neon", true},
        {"dotprod", system_has("hw.optional.arm.FEAT_DotProd")},
        {"fp16", system_has("hw.optional.arm.FEAT_FP16")},
        {"i8mm", system_has("hw.optional.arm.FEAT_I8MM")},
        {"bf16", system_has("hw.optional.arm.FEAT_BF16")},
    };
#elif defined(_WIN32)
    const Feature features[] = {{"neon", true}, {"dotprod", IsProcessorFeaturePresent(kDotProduct) != 0}};
#else
    const Feature features[] = {{"neon", true}};  // every 64-bit Arm has it
#endif
    return join(features, sizeof(features) / sizeof(features[0]), out, capacity);
}
#else
size_t list_features(char* out, size_t capacity) { return join(nullptr, 0, out, capacity); }
#endif

}  // namespace

extern "C" size_t lowtide_cpu_features(char* out, size_t capacity) {
    return list_features(out, capacity);
}

bool processor_has(const char* feature) {
    // cached: cpuid may be slow in a virtual machine
    static const std::string all = [] {
        std::string names(lowtide_cpu_features(nullptr, 0) + 1, '\0');
        lowtide_cpu_features(&names[0], names.size());
        return " " + std::string(names.c_str()) + " ";
    }();
    return all.find(" " + std::string(feature) + " ") != std::string::npos;
}

extern "C" const char* lowtide_native_version() { return LOWTIDE_VERSION; }

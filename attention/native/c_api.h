#pragma once

// What all files of the C interface share.

#include <new>

// Marks the functions that Python calls through ctypes: plain C, visible by name.
#if defined(_WIN32)
#define LOWTIDE_API extern "C" __declspec(dllexport)
#else
#define LOWTIDE_API extern "C" __attribute__((visibility("default")))
#endif

// Runs `work`. Returns 0; 1 if there is no memory; 2 if it returns false.
template <class Work> int error_code(const Work& work) {
    try {
        return work() ? 0 : 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

#pragma once

// The processor's features, and the version of this build.

#include <cstddef>

#include "c_api.h"

// Writes the names of the processor's features, separated by spaces, into `out` of `capacity` bytes and returns the
// length that is needed. A name that does not fit is left out; `out` always has a terminator.
LOWTIDE_API size_t lowtide_cpu_features(char* out, size_t capacity);

// Whether the processor has a feature of that name.
bool processor_has(const char* feature);

// The version of the package that this library was built with.
LOWTIDE_API const char* lowtide_native_version();

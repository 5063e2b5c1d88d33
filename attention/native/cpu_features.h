#pragma once

#include <cstddef>

#include "api.h"

// Writes the processor's features, separated by spaces, into `out` (`capacity` bytes, always
// terminated) and returns the length needed. Names that do not fit are left out whole.
LOWTIDE_API size_t lowtide_cpu_features(char* out, size_t capacity);

// Whether the processor has a feature of that name.
bool processor_has(const char* feature);

// The version of the package that this library was built with.
LOWTIDE_API const char* lowtide_native_version();

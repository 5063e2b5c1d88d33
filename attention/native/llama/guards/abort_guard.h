#pragma once

// Turns ggml's failed assertions into C++ exceptions.

#include <stdexcept>

#include "c_api.h"

// What a failed assertion throws.
class FailedAssertion : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// ggml ends the process when an assertion fails. Inside a guarded section of a thread, the assertion throws a C++
// exception instead, which llama.cpp's loader catches and reports. Sections nest. Threads that compute for a guarded
// pass have no section: llama/guards/running_pass.h says what happens to them.
LOWTIDE_API void lowtide_enter_guarded_section();
LOWTIDE_API void lowtide_leave_guarded_section();

// Python passes its address to ggml_set_abort_callback.
LOWTIDE_API void lowtide_on_abort(const char* message);

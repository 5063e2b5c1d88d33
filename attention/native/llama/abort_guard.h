#pragma once

// Turns ggml's failed assertions into C++ exceptions.

#include "c_api.h"

// ggml ends the process when an assertion fails. Inside a guarded section of a thread, the assertion throws a C++
// exception instead, which llama.cpp's loader catches and reports. Sections nest.
LOWTIDE_API void lowtide_enter_guarded_section();
LOWTIDE_API void lowtide_leave_guarded_section();

// Python passes its address to ggml_set_abort_callback.
LOWTIDE_API void lowtide_on_abort(const char* message);

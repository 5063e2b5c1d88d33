#pragma once

#include "api.h"

// ggml's answer to a failed assertion is to end the process. Inside a guarded section of a thread the
// assertion becomes a C++ exception instead, which llama.cpp's own loader catches and reports.
// The sections nest.
LOWTIDE_API void lowtide_enter_guarded_section();
LOWTIDE_API void lowtide_leave_guarded_section();

// The function to give to ggml_set_abort_callback.
LOWTIDE_API void lowtide_on_abort(const char* message);

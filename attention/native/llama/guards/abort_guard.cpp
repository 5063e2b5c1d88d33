// Throws from the callback of failed assertions while a section is open.

#include "llama/guards/abort_guard.h"

#include <cstdio>

#include "llama/guards/running_pass.h"

namespace {
thread_local int guarded_sections = 0;
}

extern "C" void lowtide_enter_guarded_section() { ++guarded_sections; }

extern "C" void lowtide_leave_guarded_section() {
    if (guarded_sections > 0) --guarded_sections;
}

extern "C" void lowtide_on_abort(const char* message) {
    if (guarded_sections > 0) throw FailedAssertion(message);
    leave_pass_of_this_thread(message);
    std::fprintf(stderr, "%s\n", message);  // ggml ends the process when this returns
}

// Calls llama.cpp's forward pass where a failed assertion cannot end the process.
//
// In this process a failed assertion is thrown through the pass and becomes a message. That works on the calling thread
// alone: OpenMP's other threads cannot throw. llama/try_pass.cpp tries a pass in a process of its own. A thread with too
// little stack is refused: it would end the process, too.

#include "llama/decode.h"

#include <cstdio>
#include <exception>

#include "c_api.h"
#include "llama/abort_guard.h"
#include "system/deep_stack.h"

constexpr size_t kLeastStack = 96 << 10;  // measured: passes ended the process with 64 KiB, and ran with 80 KiB

using Pass = int32_t (*)(void*, LlamaBatch);

PassStatus run_pass(void* pass, void* context, const LlamaBatch& batch, int32_t* code, char* error, size_t error_bytes) {
    PassStatus status = kPassFailed;
    const size_t left = stack_left();
    if (left != 0 && left < kLeastStack) {
        std::snprintf(error, error_bytes,
                      "this thread has %zu KiB of stack left, and a pass needs %zu: start it with more "
                      "(threading.stack_size)",
                      left >> 10, kLeastStack >> 10);
        return status;
    }
    lowtide_enter_guarded_section();
    try {
        *code = reinterpret_cast<Pass>(pass)(context, batch);
        status = kPassDone;
    } catch (const std::exception& thrown) {
        std::snprintf(error, error_bytes, "%s", thrown.what());
    } catch (...) {
        std::snprintf(error, error_bytes, "%s", "an unknown exception");
    }
    lowtide_leave_guarded_section();
    return status;
}

// Runs `pass` (llama_decode or llama_encode) on a batch. Returns 0 with what it returned in `code`; 1 where an assertion
// failed or it threw, with the reason in `error`.
LOWTIDE_API int lowtide_run_pass(void* pass, void* context, const void* batch, int32_t* code, char* error,
                                 size_t error_bytes) {
    return run_pass(pass, context, *static_cast<const LlamaBatch*>(batch), code, error, error_bytes);
}

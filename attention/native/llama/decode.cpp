// Calls llama.cpp's forward pass where a failed assertion cannot end the process.
//
// In this process a failed assertion is thrown through the pass and becomes a message. That works on the calling thread
// alone: OpenMP's other threads cannot throw. llama/try_pass.cpp tries a pass in a process of its own.

#include "llama/decode.h"

#include <cstdio>
#include <exception>

#include "c_api.h"
#include "llama/abort_guard.h"

using Pass = int32_t (*)(void*, LlamaBatch);

PassStatus run_pass(void* pass, void* context, const LlamaBatch& batch, int32_t* code, char* error, size_t error_bytes) {
    PassStatus status = kPassFailed;
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

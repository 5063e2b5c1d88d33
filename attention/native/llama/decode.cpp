// Calls llama.cpp's forward pass where a failed assertion cannot end the process.
//
// An assertion that fails on the calling thread is thrown through the pass; one that fails on another thread makes the
// caller leave (llama/guards/running_pass.h). Both become a message. llama/guards/try_pass.cpp tries a pass in a process
// of its own. A thread with too little stack is refused: it would end the process, too.

#include "llama/decode.h"

#include <cstdio>
#include <exception>

#include "c_api.h"
#include "llama/guards/abort_guard.h"
#include "llama/guards/running_pass.h"
#include "system/deep_stack.h"

namespace {

constexpr size_t kLeastStack = 96 << 10;  // measured: passes ended the process with 64 KiB, and ran with 80 KiB

using Pass = int32_t (*)(void*, LlamaBatch);

struct Call {
    Pass pass;
    void* context;
    const LlamaBatch& batch;
    int32_t code;
    PassStatus status;
    char* error;
    size_t error_bytes;
};

void run(Call& call) {
    call.status = kPassFailed;
    try {
        call.code = call.pass(call.context, call.batch);
        call.status = kPassDone;
    } catch (const FailedAssertion& failed) {
        std::snprintf(call.error, call.error_bytes, "%s", failed.what());
        call.status = kPassBroken;
    } catch (const std::exception& thrown) {
        std::snprintf(call.error, call.error_bytes, "%s", thrown.what());
    } catch (...) {
        std::snprintf(call.error, call.error_bytes, "%s", "an unknown exception");
    }
}

}  // namespace

PassStatus run_pass(void* pass, void* context, const LlamaBatch& batch, int32_t* code, char* error, size_t error_bytes) {
    const size_t left = stack_left();
    if (left != 0 && left < kLeastStack) {
        std::snprintf(error, error_bytes,
                      "this thread has %zu KiB of stack left, and a pass needs %zu: start it with more "
                      "(threading.stack_size)",
                      left >> 10, kLeastStack >> 10);
        return kPassFailed;
    }
    Call call{reinterpret_cast<Pass>(pass), context, batch, 0, kPassFailed, error, error_bytes};
    lowtide_enter_guarded_section();
    const bool was_left = !run_leavable([](void* data) { run(*static_cast<Call*>(data)); }, &call, left, error, error_bytes);
    lowtide_leave_guarded_section();
    if (was_left) call.status = kPassBroken;
    if (call.status == kPassBroken) forget_left_threads();
    *code = call.code;
    return call.status;
}

// Runs `pass` (llama_decode or llama_encode) on a batch. Returns 0 with what it returned in `code`; 1 where it threw and 4
// where an assertion failed in it, with the reason in `error`. After a 4 the context and its weights must not be freed.
LOWTIDE_API int lowtide_run_pass(void* pass, void* context, const void* batch, int32_t* code, char* error,
                                 size_t error_bytes) {
    return run_pass(pass, context, *static_cast<const LlamaBatch*>(batch), code, error, error_bytes);
}

// Threads with deep stacks on Windows, which reserves a stack and commits its pages as they are reached.

#if defined(_WIN32)

#include <windows.h>

#include <cstdint>

#include "system/deep_stack.h"

namespace {

struct Call {
    void (*function)(void*);
    void* argument;
    size_t touched;
};

// The committed part of a stack is what was reached, and the guard page below it.
size_t committed_bytes() {
    const auto* thread = reinterpret_cast<const NT_TIB*>(NtCurrentTeb());
    return size_t(static_cast<const char*>(thread->StackBase) - static_cast<const char*>(thread->StackLimit));
}

DWORD WINAPI run(void* data) {
    Call& call = *static_cast<Call*>(data);
    call.function(call.argument);
    call.touched = committed_bytes();
    return 0;
}

}  // namespace

bool run_on_deep_stack(void (*function)(void*), void* argument, size_t stack_bytes, size_t* touched) {
    Call call{function, argument, 0};
    const HANDLE thread = CreateThread(nullptr, stack_bytes, run, &call, STACK_SIZE_PARAM_IS_A_RESERVATION, nullptr);
    if (thread == nullptr) return false;
    WaitForSingleObject(thread, INFINITE);
    CloseHandle(thread);
    if (touched != nullptr) *touched = call.touched;
    return true;
}

size_t stack_left() {
    ULONG_PTR lowest = 0, highest = 0;
    GetCurrentThreadStackLimits(&lowest, &highest);
    const auto here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    return here > lowest ? here - lowest : 0;
}

#endif

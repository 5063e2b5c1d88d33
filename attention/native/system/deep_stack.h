#pragma once

// Runs a function on a thread whose stack is as large as asked for, and tells how much stack a thread has left.
//
// The stack is reserved, not touched: only the pages that the function reaches become resident, and they go back with
// the thread.

#include <cstddef>

// Calls `function(argument)` on a thread with `stack_bytes` of stack, and waits for it. `touched`, if given, becomes
// the bytes of stack that were used, or 0 where the system does not say. Returns false if no such thread can be had;
// throws std::bad_alloc. `function` must not throw.
bool run_on_deep_stack(void (*function)(void* argument), void* argument, size_t stack_bytes, size_t* touched);

// How much of the calling thread's stack is left; 0 where that is not known.
size_t stack_left();

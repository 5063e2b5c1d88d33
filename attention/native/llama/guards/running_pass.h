#pragma once

// Forward passes that run, and the way out for the caller of one in which another thread fails.
//
// ggml computes with OpenMP's threads. They cannot throw, and whoever began their work waits for all of them. So a
// thread whose assertion fails stops for ever, and the caller jumps out of the barrier where it waits. What the pass
// used may still be read by its other threads: it must never be freed.

#include <cstddef>
#include <cstdint>

// Calls `work(argument)`. Returns false where another thread of the pass failed: the caller has left the pass then, no
// destructor of it ran, and the failed assertion is in `message`. `stack_left` are the bytes of this thread's stack
// that the pass may take, 0 where that is not known.
bool run_leavable(void (*work)(void*), void* argument, size_t stack_left, char* message, size_t message_bytes);

// Called by a thread whose assertion failed. Where it computes for a pass that runs, that pass is left, and this does
// not return; otherwise it returns at once.
void leave_pass_of_this_thread(const char* message);

// Forgets the threads of a parallel region that this thread left by a jump or an exception: OpenMP starts new ones.
// Without that, later regions would have one thread, and this thread could not end.
void forget_left_threads();

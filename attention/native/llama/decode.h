#pragma once

// Calls a forward pass of llama.cpp so that a failed assertion becomes a message.

#include <cstddef>
#include <cstdint>

// llama_batch: the number of tokens and six arrays.
struct LlamaBatch {
    int32_t num_tokens;
    void* arrays[6];
};

// kPassBroken: an assertion failed in the middle of the pass. What it used must neither be used again nor be freed.
enum PassStatus { kPassDone = 0, kPassFailed = 1, kPassEnded = 2, kPassNotTried = 3, kPassBroken = 4 };

// Calls `pass` (llama_decode or llama_encode) on this thread. What it returns is in `code`; the reason of another status
// than kPassDone is in `error`.
PassStatus run_pass(void* pass, void* context, const LlamaBatch& batch, int32_t* code, char* error, size_t error_bytes);

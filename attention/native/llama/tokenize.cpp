// Calls llama.cpp's tokenizer where it cannot end the process.
//
// Its pre-tokenizers are std::regex patterns, which recurse once for every character of a match, so a long run of
// letters overflows any ordinary stack. A text therefore runs on a thread whose stack is large enough for one match
// over the whole text. What the tokenizer throws becomes a message, and so do its failed assertions.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "c_api.h"
#include "llama/guards/abort_guard.h"
#include "system/deep_stack.h"

namespace {

using Tokenize = int32_t (*)(const void*, const char*, int32_t, int32_t*, int32_t, bool, bool);

enum Status { kDone = 0, kFailed = 1, kNoStack = 2 };

struct Call {
    Tokenize tokenize;
    const void* vocabulary;
    const char* text;
    int32_t text_bytes;
    int32_t* tokens;
    int32_t capacity;
    bool add_special, parse_special;
    int32_t count;
    char* error;
    size_t error_bytes;
    Status status;
};

void run(Call& call) {
    lowtide_enter_guarded_section();
    try {
        call.count = call.tokenize(call.vocabulary, call.text, call.text_bytes, call.tokens, call.capacity,
                                   call.add_special, call.parse_special);
        call.status = kDone;
    } catch (const std::exception& error) {
        std::snprintf(call.error, call.error_bytes, "%s", error.what());
        call.status = kFailed;
    } catch (...) {
        std::snprintf(call.error, call.error_bytes, "%s", "an unknown exception");
        call.status = kFailed;
    }
    lowtide_leave_guarded_section();
}

void run_call(void* call) { run(*static_cast<Call*>(call)); }

}  // namespace

// Writes the ids of the tokens that have one of the bits of `mask` in their attributes; returns how many there are,
// which may be more than `capacity`. `attributes` is llama_vocab_get_attr.
LOWTIDE_API int32_t lowtide_tokens_with(void* attributes, const void* vocabulary, int32_t num_tokens, int32_t mask,
                                        int32_t* ids, int32_t capacity) {
    const auto attributes_of = reinterpret_cast<int (*)(const void*, int32_t)>(attributes);
    int32_t count = 0;
    for (int32_t id = 0; id < num_tokens; ++id) {
        if ((attributes_of(vocabulary, id) & mask) == 0) continue;
        if (count < capacity) ids[count] = id;
        ++count;
    }
    return count;
}

// Writes the bytes of all tokens to `text`, one after the other, and where each begins to `starts`, which has room for
// `num_tokens` + 1; returns how many bytes there are, of which the first `capacity` were written. Control tokens have
// none. `piece` is llama_token_to_piece.
LOWTIDE_API int64_t lowtide_token_pieces(void* piece, const void* vocabulary, int32_t num_tokens, char* text,
                                         int64_t capacity, uint32_t* starts) {
    using Piece = int32_t (*)(const void*, int32_t, char*, int32_t, int32_t, bool);
    constexpr int64_t kMostBytes = 1 << 30;
    const auto piece_of = reinterpret_cast<Piece>(piece);
    int64_t size = 0;
    for (int32_t id = 0; id < num_tokens; ++id) {
        starts[id] = static_cast<uint32_t>(size);
        const int64_t left = std::clamp<int64_t>(capacity - size, 0, kMostBytes);
        char* const at = text + std::min(size, capacity);
        const int32_t length = piece_of(vocabulary, id, at, static_cast<int32_t>(left), 0, false);
        size += std::abs(static_cast<int64_t>(length));  // negative where there was no room
    }
    starts[num_tokens] = static_cast<uint32_t>(size);
    return size;
}

// Tokenises `text` with llama_tokenize at `tokenize`, on a thread with `stack_bytes` of stack, or on this one where as
// much is left and nobody asks for `touched`. `count` is what
// llama_tokenize returns. Where `touched` is given it becomes the bytes of stack that were used. Returns 0; 1 where the
// tokenizer failed, with its reason in `error`; 2 where there is no thread with such a stack.
LOWTIDE_API int lowtide_tokenize(void* tokenize, const void* vocabulary, const char* text, int32_t text_bytes,
                                 int32_t* tokens, int32_t capacity, int add_special, int parse_special,
                                 size_t stack_bytes, int32_t* count, size_t* touched, char* error, size_t error_bytes) {
    Call call{reinterpret_cast<Tokenize>(tokenize), vocabulary, text, text_bytes, tokens, capacity,
              add_special != 0, parse_special != 0, 0, error, error_bytes, kFailed};
    if (touched == nullptr && stack_left() >= stack_bytes) {
        run(call);
        *count = call.count;
        return call.status;
    }
    try {
        if (!run_on_deep_stack(run_call, &call, stack_bytes, touched)) return kNoStack;
    } catch (const std::bad_alloc&) {
        return kNoStack;
    }
    *count = call.count;
    return call.status;
}

// Calls llama.cpp's tokenizer where it cannot end the process.
//
// Its pre-tokenizers are std::regex patterns, which recurse once for every character of a match, so a long run of
// letters overflows any ordinary stack. A text therefore runs on a thread whose stack is large enough for one match
// over the whole text. The stack is reserved, not touched: only the pages that the recursion reaches become resident,
// and they go back with the thread. What the tokenizer throws becomes a message, and so do its failed assertions.

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <vector>

#include "c_api.h"
#include "llama/abort_guard.h"

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

void* run_on_thread(void* call) {
    run(*static_cast<Call*>(call));
    return nullptr;
}

// Memory for a stack, with a page below it that nothing may touch; unmapped at the end.
class Stack {
public:
    explicit Stack(size_t num_bytes) : page_bytes_(size_t(sysconf(_SC_PAGESIZE))) {
        if (num_bytes > SIZE_MAX - 2 * page_bytes_) return;
        bytes_ = (num_bytes + page_bytes_ - 1) / page_bytes_ * page_bytes_ + page_bytes_;
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
#ifdef MAP_STACK
        flags |= MAP_STACK;
#endif
        void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory == MAP_FAILED) return;
        memory_ = static_cast<char*>(memory);
        mprotect(memory_, page_bytes_, PROT_NONE);
#ifdef MADV_NOHUGEPAGE
        madvise(memory_, bytes_, MADV_NOHUGEPAGE);  // a huge page would make 2 MiB resident at the first touch
#endif
    }
    ~Stack() {
        if (memory_ != nullptr) munmap(memory_, bytes_);
    }
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    void* base() const { return memory_ == nullptr ? nullptr : memory_ + page_bytes_; }
    size_t size() const { return bytes_ - page_bytes_; }

    // The bytes that are resident.
    size_t touched() const {
#ifdef __linux__
        constexpr size_t kStep = 1 << 16;  // pages whose residency is read at once
        std::vector<unsigned char> resident(kStep);
        size_t num_pages = 0;
        for (size_t at = page_bytes_; at < bytes_; at += kStep * page_bytes_) {
            const size_t step = bytes_ - at < kStep * page_bytes_ ? bytes_ - at : kStep * page_bytes_;
            if (mincore(memory_ + at, step, resident.data()) != 0) return 0;
            for (size_t i = 0; i < step / page_bytes_; ++i) num_pages += resident[i] & 1;
        }
        return num_pages * page_bytes_;
#else
        return 0;
#endif
    }

private:
    size_t page_bytes_, bytes_ = 0;
    char* memory_ = nullptr;
};

bool run_on_stack(Call& call, const Stack& stack) {
    if (stack.base() == nullptr) return false;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    const bool started = pthread_attr_setstack(&attributes, stack.base(), stack.size()) == 0 &&
                         pthread_create(&thread, &attributes, run_on_thread, &call) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    if (started) pthread_join(thread, nullptr);
    return started;
}

// How much of the calling thread's stack is left; 0 where that is not known.
size_t stack_left() {
#ifdef __linux__
    thread_local const uintptr_t lowest = [] {
        pthread_attr_t attributes;
        if (pthread_getattr_np(pthread_self(), &attributes) != 0) return UINTPTR_MAX;
        void* memory = nullptr;
        size_t num_bytes = 0, guard_bytes = 0;
        const bool known = pthread_attr_getstack(&attributes, &memory, &num_bytes) == 0 &&
                           pthread_attr_getguardsize(&attributes, &guard_bytes) == 0;
        pthread_attr_destroy(&attributes);
        return known ? reinterpret_cast<uintptr_t>(memory) + guard_bytes : UINTPTR_MAX;
    }();
    const auto here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    return here > lowest ? here - lowest : 0;
#else
    return 0;
#endif
}

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
        const Stack stack(stack_bytes);
        if (!run_on_stack(call, stack)) return kNoStack;
        if (touched != nullptr) *touched = stack.touched();
    } catch (const std::bad_alloc&) {
        return kNoStack;
    }
    *count = call.count;
    return call.status;
}

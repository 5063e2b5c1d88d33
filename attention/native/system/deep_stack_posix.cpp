// Threads with deep stacks, by POSIX: a mapping with a page below it that nothing may touch.

#if !defined(_WIN32)

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <vector>

#include "system/deep_stack.h"

namespace {

#if defined(__APPLE__)
using Residency = char;
#else
using Residency = unsigned char;
#endif

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
        constexpr size_t kStep = 1 << 16;  // pages whose residency is read at once
        std::vector<Residency> resident(kStep);
        size_t num_pages = 0;
        for (size_t at = page_bytes_; at < bytes_; at += kStep * page_bytes_) {
            const size_t step = bytes_ - at < kStep * page_bytes_ ? bytes_ - at : kStep * page_bytes_;
            if (mincore(memory_ + at, step, resident.data()) != 0) return 0;
            for (size_t i = 0; i < step / page_bytes_; ++i) num_pages += resident[i] & 1;
        }
        return num_pages * page_bytes_;
    }

private:
    size_t page_bytes_, bytes_ = 0;
    char* memory_ = nullptr;
};

struct Call {
    void (*function)(void*);
    void* argument;
};

void* run(void* data) {
    const Call call = *static_cast<const Call*>(data);
    call.function(call.argument);
    return nullptr;
}

bool run_on(const Stack& stack, Call& call) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    const bool started = pthread_attr_setstack(&attributes, stack.base(), stack.size()) == 0 &&
                         pthread_create(&thread, &attributes, run, &call) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    if (started) pthread_join(thread, nullptr);
    return started;
}

// The lowest address that the calling thread's stack may grow to; UINTPTR_MAX where that is not known.
uintptr_t lowest_of_stack() {
#if defined(__APPLE__)
    const auto highest = reinterpret_cast<uintptr_t>(pthread_get_stackaddr_np(pthread_self()));
    return highest - pthread_get_stacksize_np(pthread_self());
#elif defined(__linux__)
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) return UINTPTR_MAX;
    void* memory = nullptr;
    size_t num_bytes = 0, guard_bytes = 0;
    const bool known = pthread_attr_getstack(&attributes, &memory, &num_bytes) == 0 &&
                       pthread_attr_getguardsize(&attributes, &guard_bytes) == 0;
    pthread_attr_destroy(&attributes);
    return known ? reinterpret_cast<uintptr_t>(memory) + guard_bytes : UINTPTR_MAX;
#else
    return UINTPTR_MAX;
#endif
}

}  // namespace

bool run_on_deep_stack(void (*function)(void*), void* argument, size_t stack_bytes, size_t* touched) {
    const Stack stack(stack_bytes);
    Call call{function, argument};
    if (stack.base() == nullptr || !run_on(stack, call)) return false;
    if (touched != nullptr) *touched = stack.touched();
    return true;
}

size_t stack_left() {
    thread_local const uintptr_t lowest = lowest_of_stack();
    const auto here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    return here > lowest ? here - lowest : 0;
}

#endif

// Tries a forward pass of llama.cpp where nothing that it does can end this process.
//
// `lowtide_try_pass` runs a pass on one thread of a forked process, where even a segmentation fault ends nothing else.
// A model's first pass is tried so where its file has tensors of types that ggml may have no kernel for.

#include "c_api.h"
#include "llama/decode.h"

#if !defined(_WIN32)

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>

namespace {

using SetThreads = void (*)(void*, int32_t, int32_t);
using SetLog = void (*)(void (*)(int, const char*, void*), void*);

// A pipe that programs which are started meanwhile do not inherit.
bool open_pipe(int (&ends)[2]) {
#if defined(__linux__)
    return pipe2(ends, O_CLOEXEC) == 0;
#else
    if (pipe(ends) != 0) return false;
    for (int end : ends) fcntl(end, F_SETFD, FD_CLOEXEC);
    return true;
#endif
}

void ignore_log(int, const char*, void*) {}

// In the child: one pass on this thread. Writes the status, and the reason behind it, into the pipe.
[[noreturn]] void try_and_exit(void* pass, void* context, const LlamaBatch& batch, void* set_threads, void* set_log,
                               unsigned seconds, int pipe_end) {
    for (int number : {SIGSEGV, SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGALRM, SIGTERM, SIGINT}) signal(number, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    const rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    const int nowhere = open("/dev/null", O_WRONLY);
    if (nowhere >= 0) dup2(nowhere, STDERR_FILENO);  // ggml prints where it fails
    alarm(seconds);
    reinterpret_cast<SetLog>(set_log)(ignore_log, nullptr);  // the log of the parent waits for Python
    reinterpret_cast<SetThreads>(set_threads)(context, 1, 1);
    char answer[1024] = {};
    int32_t code = 0;
    answer[0] = char('0' + run_pass(pass, context, batch, &code, answer + 1, sizeof answer - 1));
    const ssize_t written = write(pipe_end, answer, 1 + std::strlen(answer + 1));
    _exit(written > 0 ? 0 : 1);
}

size_t read_all(int pipe_end, char* into, size_t capacity) {
    size_t length = 0;
    while (length < capacity) {
        const ssize_t count = read(pipe_end, into + length, capacity - length);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) break;
        length += size_t(count);
    }
    return length;
}

}  // namespace

// Runs `pass` in a forked process for at most `seconds`; this process' memory stays as it is. Returns 0 where the pass
// ended, whatever it returned; 1 where it threw, with the reason in `error`; 2 where the process ended, with the signal
// in `ended_by` (0: unknown); 3 where no process could be started, as on Windows, which cannot fork. `set_threads` and
// `set_log` are llama_set_n_threads and llama_log_set.
LOWTIDE_API int lowtide_try_pass(void* pass, void* context, const void* batch, void* set_threads, void* set_log,
                                 unsigned seconds, int32_t* ended_by, char* error, size_t error_bytes) {
    int ends[2];
    if (!open_pipe(ends)) return kPassNotTried;
    const pid_t child = fork();
    if (child == 0) {
        try_and_exit(pass, context, *static_cast<const LlamaBatch*>(batch), set_threads, set_log, seconds, ends[1]);
    }
    close(ends[1]);
    if (child < 0) {
        close(ends[0]);
        return kPassNotTried;
    }
    char answer[1024] = {};
    const size_t length = read_all(ends[0], answer, sizeof answer - 1);
    close(ends[0]);
    int how = 0;
    pid_t waited;
    do waited = waitpid(child, &how, 0);
    while (waited < 0 && errno == EINTR);
    if (length > 0) {
        std::snprintf(error, error_bytes, "%s", answer + 1);
        return answer[0] - '0';
    }
    *ended_by = waited == child && WIFSIGNALED(how) ? WTERMSIG(how) : 0;
    return kPassEnded;
}

#else

LOWTIDE_API int lowtide_try_pass(void*, void*, const void*, void*, void*, unsigned, int32_t*, char*,
                                 size_t) {
    return kPassNotTried;
}

#endif

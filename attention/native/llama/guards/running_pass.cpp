// Leaves passes by a signal, on Linux with GCC's OpenMP library. The signal comes from the failed thread, again and
// again, until its caller is found waiting in that library: there it holds no lock, and it would wait for ever.

#include "llama/guards/running_pass.h"

#if defined(__linux__) && defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <mutex>

namespace {

constexpr int kMostRanges = 16;
constexpr int kTimesStuck = 3;             // at the same place, before the caller jumps
constexpr useconds_t kSignalPause = 1000;  // microseconds
constexpr uintptr_t kUnknownStack = 1 << 20;

struct RunningPass {
    sigjmp_buf exit;
    pthread_t thread;
    uintptr_t stack_begin, stack_end;  // where the caller's frames of the pass lie
    RunningPass* next;
    uint64_t number;
    char message[1024];
    std::atomic<bool> has_failed;
    uintptr_t stuck_at;  // the stack pointer of the last signal, and how often in a row it was that
    int times_stuck;
};

struct Registry {
    std::mutex mutex;
    RunningPass* first = nullptr;
    uint64_t num_passes = 0;
};

// Never destroyed: stopped threads may look into it while the process ends.
Registry& registry() {
    static Registry* const made = [] {
        auto* registry = new Registry;
        static Registry* at_fork;
        at_fork = registry;
        pthread_atfork([] { at_fork->mutex.lock(); }, [] { at_fork->mutex.unlock(); },
                       [] {
                           at_fork->first = nullptr;  // their threads are not here
                           at_fork->mutex.unlock();
                       });
        return registry;
    }();
    return *made;
}

// Of a static kind, because the signal handler reads it on any thread.
__attribute__((tls_model("initial-exec"))) thread_local RunningPass* pass_of_caller = nullptr;

struct Range {
    uintptr_t begin, end;
};

// The code of OpenMP libraries; written before the handler is installed.
Range openmp_code[kMostRanges];
int num_ranges = 0;

bool is_openmp(const dl_phdr_info* info) { return info->dlpi_name != nullptr && std::strstr(info->dlpi_name, "libgomp") != nullptr; }

int add_code(dl_phdr_info* info, size_t, void*) {
    if (!is_openmp(info)) return 0;
    for (int i = 0; i < info->dlpi_phnum && num_ranges < kMostRanges; ++i) {
        const ElfW(Phdr)& header = info->dlpi_phdr[i];
        if (header.p_type != PT_LOAD || (header.p_flags & PF_X) == 0) continue;
        const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
        openmp_code[num_ranges++] = {begin, begin + header.p_memsz};
    }
    return 0;
}

bool is_openmp_code(uintptr_t address) {
    for (int i = 0; i < num_ranges; ++i)
        if (address >= openmp_code[i].begin && address < openmp_code[i].end) return true;
    return false;
}

struct Place {
    uintptr_t stack;
    bool in_openmp;
};

Place place_of(const ucontext_t* context) {
#if defined(__x86_64__)
    const auto* registers = context->uc_mcontext.gregs;
    return {uintptr_t(registers[REG_RSP]), is_openmp_code(uintptr_t(registers[REG_RIP]))};
#else
    const auto& registers = context->uc_mcontext;  // it may be in the C library's syscall(), which has no frame
    return {uintptr_t(registers.sp), is_openmp_code(registers.pc) || is_openmp_code(registers.regs[30])};
#endif
}

void leave_where_stuck(int, siginfo_t*, void* context) {
    RunningPass* pass = pass_of_caller;
    if (pass == nullptr || !pass->has_failed.load()) return;
    const Place place = place_of(static_cast<const ucontext_t*>(context));
    if (!place.in_openmp || place.stack != pass->stuck_at) {
        pass->stuck_at = place.in_openmp ? place.stack : 0;
        pass->times_stuck = 0;
    } else if (++pass->times_stuck >= kTimesStuck) {
        pass_of_caller = nullptr;
        siglongjmp(pass->exit, 1);
    }
}

const int kSignals[] = {SIGURG, SIGRTMAX - 1, SIGRTMAX - 2};  // the first that the program leaves alone is used

// Returns the signal that makes a caller leave, 0 where there is none. Called with the registry locked.
int leaving_signal() {
    if (num_ranges == 0) dl_iterate_phdr(add_code, nullptr);
    if (num_ranges == 0) return 0;
    for (const int number : kSignals) {
        struct sigaction before {};
        if (sigaction(number, nullptr, &before) != 0) continue;
        if ((before.sa_flags & SA_SIGINFO) != 0 && before.sa_sigaction == leave_where_stuck) return number;
        if ((before.sa_flags & SA_SIGINFO) != 0 || (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)) continue;
        struct sigaction ours {};
        ours.sa_sigaction = leave_where_stuck;
        ours.sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER;  // a jump out of it leaves nothing blocked
        sigemptyset(&ours.sa_mask);
        if (sigaction(number, &ours, nullptr) == 0) return number;
    }
    return 0;
}

// A thread that blocks the signal could not leave.
void let_signals_in() {
    thread_local const bool done = [] {
        sigset_t signals;
        sigemptyset(&signals);
        for (const int number : kSignals) sigaddset(&signals, number);
        return pthread_sigmask(SIG_UNBLOCK, &signals, nullptr) == 0;
    }();
    (void)done;
}

bool contains(const RunningPass& pass, uintptr_t address) { return address > pass.stack_begin && address < pass.stack_end; }

// The pass for which this thread computes: OpenMP hands a thread the address of its work, which lies on the stack of
// the caller, and the thread has it on its own stack. Called with the registry locked.
RunningPass* pass_of_worker() {
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) return nullptr;
    void* memory = nullptr;
    size_t num_bytes = 0;
    const bool known = pthread_attr_getstack(&attributes, &memory, &num_bytes) == 0;
    pthread_attr_destroy(&attributes);
    if (!known) return nullptr;
    const auto* end = reinterpret_cast<const uintptr_t*>(static_cast<const char*>(memory) + num_bytes);
    const auto* here = static_cast<const uintptr_t*>(__builtin_frame_address(0));
    for (const uintptr_t* word = end - 1; word > here; --word)  // the oldest frames first
        for (RunningPass* pass = registry().first; pass != nullptr; pass = pass->next)
            if (contains(*pass, *word)) return pass;
    return nullptr;
}

bool is_running(const RunningPass* pass, uint64_t number) {
    for (const RunningPass* other = registry().first; other != nullptr; other = other->next)
        if (other == pass) return other->number == number;
    return false;
}

void begin(RunningPass& pass, size_t stack_left) {
    const auto here = reinterpret_cast<uintptr_t>(&pass);
    pass.thread = pthread_self();
    pass.stack_end = here;
    pass.stack_begin = here - (stack_left > 0 ? stack_left : kUnknownStack);
    pass.has_failed.store(false);
    pass.stuck_at = 0, pass.times_stuck = 0;
    const std::lock_guard<std::mutex> lock(registry().mutex);
    pass.number = ++registry().num_passes;
    pass.next = registry().first;
    registry().first = &pass;
}

void end(const RunningPass& pass) {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    for (RunningPass** at = &registry().first; *at != nullptr; at = &(*at)->next)
        if (*at == &pass) {
            *at = pass.next;
            return;
        }
}

// Ends a pass also where its work throws.
class Registration {
public:
    Registration(RunningPass& pass, size_t stack_left) : pass_(pass) {
        begin(pass, stack_left);
        pass_of_caller = &pass;
    }
    ~Registration() {
        pass_of_caller = nullptr;
        end(pass_);
    }
    Registration(const Registration&) = delete;
    Registration& operator=(const Registration&) = delete;

private:
    RunningPass& pass_;
};

using Level = int (*)();

// Of the System V ABI for thread-local storage.
struct TlsIndex {
    size_t module, offset;
};
extern "C" void* __tls_get_addr(TlsIndex* index);

// Gives a library's variables of this thread the values that a new thread has.
int forget_threads_of(dl_phdr_info* info, size_t, void*) {
    if (!is_openmp(info) || info->dlpi_tls_modid == 0) return 0;
    void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return 0;
    const auto level = reinterpret_cast<Level>(dlsym(library, "omp_get_level"));
    const bool is_in_region = level != nullptr && level() > 0;
    dlclose(library);
    if (!is_in_region) return 0;
    TlsIndex index{info->dlpi_tls_modid, 0};  // dlpi_tls_data is null until somebody asks for it so
    void* const variables = __tls_get_addr(&index);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr)& header = info->dlpi_phdr[i];
        if (header.p_type != PT_TLS) continue;
        std::memset(variables, 0, header.p_memsz);
        std::memcpy(variables, reinterpret_cast<const void*>(info->dlpi_addr + header.p_vaddr), header.p_filesz);
    }
    return 0;
}

}  // namespace

bool run_leavable(void (*work)(void*), void* argument, size_t stack_left, char* message, size_t message_bytes) {
    let_signals_in();
    RunningPass pass;
    Registration registration(pass, stack_left);
    if (sigsetjmp(pass.exit, 0) == 0) {
        work(argument);
        return true;
    }
    std::snprintf(message, message_bytes, "%s", pass.message);
    return false;
}

void leave_pass_of_this_thread(const char* message) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);  // signals are for threads that go on
    registry().mutex.lock();
    RunningPass* const pass = pass_of_worker();
    const int number = pass == nullptr ? 0 : leaving_signal();
    if (number == 0) {
        registry().mutex.unlock();
        return;
    }
    const uint64_t number_of_pass = pass->number;
    if (!pass->has_failed.load()) {
        std::snprintf(pass->message, sizeof pass->message, "%s", message);
        pass->has_failed.store(true);
    }
    while (is_running(pass, number_of_pass)) {
        pthread_kill(pass->thread, number);
        registry().mutex.unlock();
        usleep(kSignalPause);
        registry().mutex.lock();
    }
    registry().mutex.unlock();
    for (;;) pause();
}

void forget_left_threads() { dl_iterate_phdr(forget_threads_of, nullptr); }

#else

bool run_leavable(void (*work)(void*), void* argument, size_t, char*, size_t) {
    work(argument);
    return true;
}

void leave_pass_of_this_thread(const char*) {}

void forget_left_threads() {}

#endif

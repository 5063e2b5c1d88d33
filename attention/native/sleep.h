#pragma once

// Waiting that gives way: spin for as long as a wait usually lasts while all threads run, then sleep in the kernel.

#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif

// Tells the core that this thread only spins, so that a hyperthread beside it gets the execution units.
inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Longer than the work of one thread between two steps that threads share, and than what a thread waits for the last
// of the others; shorter than the time in which a scheduler gives a core to another process.
constexpr std::chrono::microseconds kSpinTime{50};

// A number that threads wait to change.
class WaitableNumber {
public:
    uint32_t load() const { return number_.load(std::memory_order_seq_cst); }

    // Changes the number and wakes whoever sleeps.
    void advance() {
        number_.fetch_add(1, std::memory_order_seq_cst);
        if (num_asleep_.load(std::memory_order_seq_cst) != 0) wake();
    }

    // Returns when the number is not `seen`: after spinning, then asleep.
    void wait_for_change(uint32_t seen) {
        const auto start = std::chrono::steady_clock::now();
        for (int spins = 1; load() == seen; ++spins) {
            relax();
            if (spins % 32 != 0 || std::chrono::steady_clock::now() - start < kSpinTime) continue;
            // A thread that falls asleep late is seen by the `advance` of its change: it either finds the new number
            // or is counted before. It is counted until it is awake: who is woken by an earlier change sleeps again.
            num_asleep_.fetch_add(1, std::memory_order_seq_cst);
            while (load() == seen) sleep(seen);
            num_asleep_.fetch_sub(1, std::memory_order_seq_cst);
            return;
        }
    }

private:
#if defined(__linux__)
    void sleep(uint32_t seen) { syscall(SYS_futex, address(), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0); }
    void wake() { syscall(SYS_futex, address(), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
    uint32_t* address() { return reinterpret_cast<uint32_t*>(&number_); }
#else
    void sleep(uint32_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return load() != seen; });
    }
    void wake() {
        { std::lock_guard<std::mutex> lock(mutex_); }
        changed_.notify_all();
    }
    std::mutex mutex_;
    std::condition_variable changed_;
#endif

    static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "the kernel waits on the number itself");
    std::atomic<uint32_t> number_{0};
    std::atomic<uint32_t> num_asleep_{0};
};

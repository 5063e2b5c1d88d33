#pragma once

#include <atomic>
#include <thread>

// Tells a processor whose core has another thread on it that this one only waits.
inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Lets a fixed number of threads wait for one another; spins, as the waits are of microseconds, and
// yields when they are not.
class Barrier {
public:
    void wait(int num_threads) {
        wait(num_threads, [] {});
    }

    // The last thread to arrive does `then` before any of them goes on.
    template <class Then> void wait(int num_threads, Then then) {
        const int round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            then();
            round_.fetch_add(1, std::memory_order_acq_rel);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
            relax();
            if (spins > 20000) std::this_thread::yield();
        }
    }

private:
    std::atomic<int> arrived_{0};
    std::atomic<int> round_{0};
};

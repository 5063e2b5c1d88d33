#pragma once

#include <atomic>
#include <thread>

// Lets a fixed number of threads wait for one another; spins, as the waits are of microseconds, and
// yields when they are not.
class Barrier {
public:
    void wait(int num_threads) {
        const int round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.fetch_add(1, std::memory_order_acq_rel);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
            if (spins > 20000) std::this_thread::yield();
    }

private:
    std::atomic<int> arrived_{0};
    std::atomic<int> round_{0};
};

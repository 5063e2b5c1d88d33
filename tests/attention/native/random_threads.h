#pragma once

// Thread groups for tests.

#include <thread>
#include <vector>

#include "checks.h"
#include "threads.h"

// Runs `work(threads)` on that many threads, which meet at barriers like ggml's.
template <class Work> void on_thread_group(int num_threads, const Work& work) {
    Barrier barrier;
    on_threads(num_threads, [&](int thread) {
        BarrierThreadGroup threads(barrier, thread, num_threads);
        work(threads);
    });
}

// Real threads, or the calling thread for all of them in reverse order.
class RandomThreadGroup : public ThreadGroup {
public:
    explicit RandomThreadGroup(int count) : ThreadGroup(count) {}

protected:
    void do_parallel_for(Work work, Call then) override {
        if (pick(0, 1)) {
            for (int thread = num_threads - 1; thread >= 0; --thread) work(thread);
        } else {
            std::vector<std::thread> threads;
            for (int thread = 0; thread < num_threads; ++thread) threads.emplace_back(work, thread);
            for (std::thread& thread : threads) thread.join();
        }
        then();
    }
    void do_single(Call then) override { then(); }
};

#pragma once

// Barriers and thread groups.

#include <atomic>
#include <type_traits>

#include "sleep.h"

// A barrier for a fixed number of threads. It spins, since waits take microseconds, and sleeps when they take longer.
class Barrier {
public:
    void wait(int num_threads) {
        wait(num_threads, [] {});
    }

    // The last thread to arrive calls `then` before any thread continues.
    template <class Then> void wait(int num_threads, Then then) {
        const uint32_t round = round_.load();
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            then();
            round_.advance();
            return;
        }
        round_.wait_for_change(round);
    }

private:
    std::atomic<int> arrived_{0};
    WaitableNumber round_;
};

// Threads that run one step after another together, whoever owns them.
class ThreadGroup {
public:
    explicit ThreadGroup(int count) : num_threads(count) {}
    virtual ~ThreadGroup() = default;

    const int num_threads;

    // Calls `work(thread)` for each thread, then `then()` once. When it returns, all of that is done.
    template <class Work, class Then> void parallel_for(Work&& work, Then&& then) {
        do_parallel_for({const_cast<void*>(static_cast<const void*>(&work)),
                [](void* w, int thread) { (*static_cast<std::remove_reference_t<Work>*>(w))(thread); }},
                        call_of(then));
    }

    // Calls `then()` once.
    template <class Then> void single(Then&& then) { do_single(call_of(then)); }

protected:
    struct Work {
        void* work;
        void (*call)(void* work, int thread);
        void operator()(int thread) const { call(work, thread); }
    };
    struct Call {
        void* function;
        void (*call)(void* function);
        void operator()() const { call(function); }
    };

    virtual void do_parallel_for(Work work, Call then) = 0;
    virtual void do_single(Call then) = 0;

private:
    template <class Then> static Call call_of(Then& then) {
        return {const_cast<void*>(static_cast<const void*>(&then)), [](void* t) { (*static_cast<Then*>(t))(); }};
    }
};

// One of several threads that all run the same code, like ggml's, and meet at a barrier.
class BarrierThreadGroup : public ThreadGroup {
public:
    BarrierThreadGroup(Barrier& barrier, int thread, int count) : ThreadGroup(count), barrier_(barrier), thread_(thread) {}

protected:
    void do_parallel_for(Work work, Call then) override {
        work(thread_);
        barrier_.wait(num_threads, then);
    }
    void do_single(Call then) override { barrier_.wait(num_threads, then); }

private:
    Barrier& barrier_;
    const int thread_;
};

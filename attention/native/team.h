#pragma once

#include <type_traits>

#include "barrier.h"

// Threads that do one thing after another together, whoever owns them.
class Team {
public:
    explicit Team(int num_threads) : num_threads(num_threads) {}
    virtual ~Team() = default;

    const int num_threads;

    // Has `work(thread)` done for each thread, then `then()` once; whoever goes on, all of that is done.
    template <class Work, class Then> void all(Work&& work, Then&& then) {
        do_all({const_cast<void*>(static_cast<const void*>(&work)),
                [](void* w, int thread) { (*static_cast<std::remove_reference_t<Work>*>(w))(thread); }},
               call_of(then));
    }

    // Has `then()` done once.
    template <class Then> void once(Then&& then) { do_once(call_of(then)); }

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

    virtual void do_all(Work work, Call then) = 0;
    virtual void do_once(Call then) = 0;

private:
    template <class Then> static Call call_of(Then& then) {
        return {const_cast<void*>(static_cast<const void*>(&then)), [](void* t) { (*static_cast<Then*>(t))(); }};
    }
};

// One of several threads that all run the same code, as ggml's do; the barrier is for all of them.
class ThreadOfTeam : public Team {
public:
    ThreadOfTeam(Barrier& barrier, int thread, int num_threads) : Team(num_threads), barrier_(barrier), thread_(thread) {}

protected:
    void do_all(Work work, Call then) override {
        work(thread_);
        barrier_.wait(num_threads, then);
    }
    void do_once(Call then) override { barrier_.wait(num_threads, then); }

private:
    Barrier& barrier_;
    const int thread_;
};

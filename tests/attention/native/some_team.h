#pragma once

#include <thread>
#include <vector>

#include "checks.h"
#include "team.h"

// Threads that come and go, or one that does the work of all, last things first.
class SomeTeam : public Team {
public:
    explicit SomeTeam(int num_threads) : Team(num_threads) {}

protected:
    void do_all(Work work, Call then) override {
        if (pick(0, 1)) {
            for (int thread = num_threads - 1; thread >= 0; --thread) work(thread);
        } else {
            std::vector<std::thread> threads;
            for (int thread = 0; thread < num_threads; ++thread) threads.emplace_back(work, thread);
            for (std::thread& thread : threads) thread.join();
        }
        then();
    }
    void do_once(Call then) override { then(); }
};

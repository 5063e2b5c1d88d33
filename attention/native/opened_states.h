#pragma once

#include <cstddef>

#include "attend.h"
#include "attention_problem.h"
#include "exchange_room.h"
#include "watched_scores.h"

// States that a row looks at. Where one gets more than a share of a head's weight, its key is seen as it is by all heads
// of the KV head.
class OpenedStates {
public:
    // Room for the problem; throws std::bad_alloc.
    void reserve(const AttentionProblem& problem, int num_threads);

    // Has a problem of a few rows leave its scores here.
    void watch(AttentionProblem& problem) { watched_.watch(problem, 0); }

    // Opens what the row gave more than `share` of its weight among the first `num_states` keys. Returns how many.
    // By one of the threads that `attend` has room for.
    int open(const AttentionProblem& problem, int num_states, int kv_head, int row, float share, const KernelSet& kernels,
             Attend& attend, int thread);

    size_t num_bytes() const { return watched_.num_bytes() + room_.num_bytes(); }

private:
    WatchedScores watched_;
    ExchangeRoom room_;
};

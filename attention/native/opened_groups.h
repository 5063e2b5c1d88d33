#pragma once

#include <cstddef>

#include "attend.h"
#include "attention_problem.h"
#include "exchange_room.h"
#include "key_groups.h"
#include "watched_scores.h"

// Groups that a row looks into. One that gets more than a share of a head's weight is opened: its keys take its place,
// each with its own score and value, for all heads of the KV head.
class OpenedGroups {
public:
    // Room for problems of so many keys and groups at most; throws std::bad_alloc.
    void reserve(const AttentionProblem& problem, int most_keys, int num_threads);

    // Has one KV head's problem, of a few rows, leave its scores here.
    void watch(AttentionProblem& of_head, int kv_head) { watched_.watch(of_head, kv_head); }

    // Opens what the row gave more than `share` of its weight in the watched problem, whose first row is the problem's
    // `first_row`. Returns how many keys came in. By one of the threads that `attend` has room for.
    int open(const AttentionProblem& problem, const KeyGroups& groups, int kv_head, int first_row, int row, float share,
             const KernelSet& kernels, Attend& attend, int thread);

    size_t num_bytes() const { return watched_.num_bytes() + room_.num_bytes(); }

private:
    WatchedScores watched_;
    ExchangeRoom room_;
};

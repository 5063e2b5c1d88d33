#pragma once

#include <vector>

#include "attention_problem.h"
#include "barrier.h"

// Exact attention over a whole node, shared out between threads.
class Attend {
public:
    // Called by each of `num_threads` threads with its own `thread`. Thread 0's allocation happens before
    // the first barrier; results do not depend on num_threads.
    void run(const AttentionProblem& problem, const KernelSet& kernels, int thread, int num_threads);

    size_t scratch_bytes() const { return sizeof(float) * (scratch_.size() + partials_.size()); }

private:
    void attend_split(const AttentionProblem& problem, const KernelSet& kernels, int thread, int num_threads);
    void attend_tiled(const AttentionProblem& problem, const KernelSet& kernels, int thread, int num_threads);

    std::vector<float> scratch_;
    std::vector<float> partials_;
    Barrier barrier_;
};

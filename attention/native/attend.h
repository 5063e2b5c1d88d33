#pragma once

#include <atomic>
#include <vector>

#include "attention_problem.h"
#include "barrier.h"
#include "team.h"

// Exact attention over a whole node, shared out between threads.
class Attend {
public:
    // Makes room for the problem on `num_threads` threads, before any of them runs; false where there is no
    // memory for it.
    bool reserve(const AttentionProblem& problem, int num_threads);

    // For a problem that there is room for; threads beyond those reserved for only wait. Results do not depend on the
    // number of threads. The second form is called by each of `num_threads` threads with its own `thread`.
    void run(const AttentionProblem& problem, const KernelSet& kernels, Team& team);
    void run(const AttentionProblem& problem, const KernelSet& kernels, int thread, int num_threads);

    // The same for several problems that differ in rows and keys alone; there is room for all of them once there is
    // for one that has the most of both.
    bool reserve_many(const AttentionProblem& problem, int num_threads);
    void run_many(const AttentionProblem* problems, int count, const KernelSet& kernels, int thread, int num_threads);

    // A row's partials over the problem's keys, as one of the reserved threads adds them: `count` partials that have seen
    // nothing, and all heads of a problem of one row and one KV head.
    static void start(const AttentionProblem& problem, int count, float* partials);
    void add(const AttentionProblem& problem, const KernelSet& kernels, int thread, float* partials);

    int num_workers(int num_threads) const { return num_threads < reserved_threads_ ? num_threads : reserved_threads_; }
    size_t scratch_bytes() const { return sizeof(float) * (scratch_.size() + partials_.size()); }

private:
    void attend_split(const AttentionProblem& problem, const KernelSet& kernels, int thread, int num_workers);
    void merge_split(const AttentionProblem& problem, int thread, int num_workers);
    void attend_tiled(const AttentionProblem& problem, const KernelSet& kernels, int thread, int num_workers);
    void attend_tile(const AttentionProblem& problem, const KernelSet& kernels, int kv_head, int begin, int end,
                     float* scratch, float* partials, float* merged);

    std::vector<float> scratch_;
    std::vector<float> partials_;
    int reserved_threads_ = 0;
    std::atomic<int> next_item_{0};
    Barrier barrier_;
};

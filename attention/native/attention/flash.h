#pragma once

// Exact attention over any number of threads.

#include <atomic>
#include <vector>

#include "attention/problem.h"
#include "c_api.h"
#include "threads.h"

// Exact attention of one graph node, with online softmax over blocks of keys (FlashAttention), split between threads.
class FlashAttention {
public:
    // Allocates scratch for the problem and `num_threads` threads. Call it before the threads run. Returns false if
    // there is no memory.
    bool reserve(const AttentionProblem& problem, int num_threads);

    // Needs a `reserve` for a problem at least as large. Threads beyond the reserved number only wait. Results do not
    // depend on the number of threads.
    void run(const AttentionProblem& problem, const AttentionKernels& kernels, ThreadGroup& threads);

    // The same for several problems with different tokens and keys, such as the sequences of a batch. `problem` must
    // have the most tokens and the most keys of them.
    bool reserve_many(const AttentionProblem& problem, int num_threads);
    void run_many(const AttentionProblem* problems, int count, const AttentionKernels& kernels, ThreadGroup& threads);

    // Partial results of one token, added by one of the reserved threads. `start_partials` makes `count` empty ones;
    // `add_keys` adds the keys of a problem of one token and one KV head to those of its heads.
    static void start_partials(const AttentionProblem& problem, int count, float* partials);
    void add_keys(const AttentionProblem& problem, const AttentionKernels& kernels, int thread, float* partials);

    int num_workers(int num_threads) const { return num_threads < reserved_threads_ ? num_threads : reserved_threads_; }
    size_t scratch_bytes() const { return sizeof(float) * (scratch_.size() + partials_.size()); }

private:
    void attend_split(const AttentionProblem& problem, const AttentionKernels& kernels, int thread, int num_workers);
    void merge_split(const AttentionProblem& problem, int thread, int num_workers);
    void attend_tiled(const AttentionProblem& problem, const AttentionKernels& kernels, int thread, int num_workers);
    void attend_tile(const AttentionProblem& problem, const AttentionKernels& kernels, int kv_head, int begin, int end,
                     float* scratch, float* partials, float* merged);

    std::vector<float> scratch_;
    std::vector<float> partials_;
    int reserved_threads_ = 0;
    std::atomic<int> next_item_{0};
};

// Whether this build and this processor have the attention kernels of that name. Null: any.
LOWTIDE_API int lowtide_has_attention_kernels(const char* kernels);

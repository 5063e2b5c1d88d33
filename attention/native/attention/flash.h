#pragma once

// Exact attention over any number of threads.

#include <atomic>
#include <vector>

#include "attention/problem.h"
#include "c_api.h"
#include "threads.h"

// A chunk of keys that neighbouring problems attend to in the same slots, such as the sequences of a batch that begin
// with the same text.
struct SharedChunk {
    int first, last;    // the problems
    int chunk;          // counted from the first key
    int num_tokens;     // of all these problems
    size_t before;      // tokens of the shared chunks before this one: where its partial results are
};

// The shared chunks of a batch. Problem i shares its first num_shared[i] chunks, those with the numbers
// chunk_ids[i * max_shared ...].
struct SharedChunks {
    std::vector<SharedChunk> chunks;
    std::vector<int> num_shared, chunk_ids;
    int max_shared = 0;
    size_t num_tokens = 0;

    int id(int problem, int chunk) const { return chunk_ids[size_t(problem) * max_shared + chunk]; }
    size_t num_bytes() const {
        return sizeof(SharedChunk) * chunks.capacity() + sizeof(int) * (num_shared.capacity() + chunk_ids.capacity());
    }
};

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
    // have the most tokens and the most keys of them. The keys that problems share are read once for all of them, as
    // one matrix product (Hydragen, arXiv 2402.05099).
    bool reserve_many(const AttentionProblem& problem, const SharedChunks& shared, int num_threads);
    void run_many(const AttentionProblem* problems, int count, const SharedChunks& shared, const AttentionKernels& kernels,
                  ThreadGroup& threads);

    // Partial results of one token, added by one of the reserved threads. `start_partials` makes `count` empty ones;
    // `add_keys` adds the keys of a problem of one token and one KV head to those of its heads.
    static void start_partials(const AttentionProblem& problem, int count, float* partials);
    void add_keys(const AttentionProblem& problem, const AttentionKernels& kernels, int thread, float* partials);

    int num_workers(int num_threads) const { return num_threads < reserved_threads_ ? num_threads : reserved_threads_; }
    size_t scratch_bytes() const { return sizeof(float) * (scratch_.size() + partials_.size() + shared_partials_.size()); }

private:
    void attend_split(const AttentionProblem& problem, const AttentionKernels& kernels, int thread, int num_workers);
    void merge_split(const AttentionProblem& problem, int thread, int num_workers);
    void attend_tiled(const AttentionProblem& problem, const AttentionKernels& kernels, int thread, int num_workers);
    void attend_tile(const AttentionProblem& problem, const AttentionKernels& kernels, int kv_head, int begin, int end,
                     float* scratch, float* partials, float* merged);

    void attend_shared(const AttentionProblem* problems, const SharedChunks& shared, const AttentionKernels& kernels, int thread,
                       int num_workers);
    void attend_rest(const AttentionProblem* problems, int count, const SharedChunks& shared, const AttentionKernels& kernels,
                     int thread, int num_workers);
    void attend_heads(const AttentionProblem& problem, const SharedChunks& shared, const AttentionProblem* problems,
                      const AttentionKernels& kernels, int first_head, int num_heads, float* scratch, float* partials);
    const float* shared_partials(const AttentionProblem& problem, const SharedChunk& chunk, int kv_head) const;

    std::vector<float> scratch_;
    std::vector<float> partials_;
    std::vector<float> shared_partials_;
    int reserved_threads_ = 0;
    std::atomic<int> next_item_{0};
};

// Whether this build and this processor have the attention kernels of that name. Null: any.
LOWTIDE_API int lowtide_has_attention_kernels(const char* kernels);

#pragma once

// The `delta` policy with a block size: key blocks that are similar share one dot product.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/flash.h"
#include "attention/problem.h"
#include "c_api.h"
#include "sparse/delta/block_store.h"
#include "sparse/error_stats.h"
#include "sparse/policy.h"
#include "sparse/refine.h"
#include "threads.h"

// Refines scores: a key that gets more than a share of a head's softmax weight through merged blocks is scored again
// with its exact key, for all heads of the KV head.
class BlockRefiner {
public:
    // Reserves scratch for the problem. Throws std::bad_alloc.
    void reserve(const AttentionProblem& problem, int num_threads);

    // Has a problem of a few tokens record its scores here.
    void record(AttentionProblem& problem) { recorder_.record(problem, 0); }

    // Refines the keys among the first `num_merged` that got more than `threshold` of a head's weight. Returns their
    // number. Called by one of the threads that `attend` has reserved.
    int refine(const AttentionProblem& problem, int num_merged, int kv_head, int token, float threshold, const AttentionKernels& kernels,
               FlashAttention& attend, int thread);

    size_t num_bytes() const { return recorder_.num_bytes() + scratch_.num_bytes(); }

private:
    ScoreRecorder recorder_;
    MergeScratch scratch_;
};

// Settings of all layers. Python fills it in.
struct DeltaBlocksRule {
    int32_t window;           // the last keys of each token, its own among them, are exact
    int32_t num_sink_tokens;  // the first keys of the cache are never merged
    int32_t block_size;       // channels per block: 1, 8 or 16
    float refine;             // keys above this share of a head's weight are refined in decoding; 0: none
};

// The cost of the scores, summed over forward passes: for the last token of each pass and all KV heads. A channel of
// a key counts once for all query heads of its KV head.
struct ScoreCounts {
    int64_t channels_total;       // of all visible keys
    int64_t channels_merged;      // of those that are merged
    int64_t channels_stored;      // stored for these
    int64_t channels_multiplied;  // of all: the stored ones, and those of exact keys
    int64_t key_bytes_total;      // of all visible keys in the cache
    int64_t key_bytes_read;       // of stored blocks with assignments, and of exact keys in the cache
};

// Attention over merged keys. Behind the window, a query sees merged blocks (BlockStore) instead of keys: a stored
// block costs one dot product and one read for all keys that it stands for. Values are exact. The policy needs a
// batch whose tokens see a prefix of the cache, each one slot more than the token before; it skips others.
class DeltaBlocksPolicy : public MeasuredPolicy {
public:
    using MeasuredPolicy::MeasuredPolicy;

    // For each layer and KV head, (num_layers, num_kv_heads): the threshold, the largest share of a page's blocks to
    // store (1: the threshold alone decides), and the channel scales (..., key_dim). A layer with a negative
    // threshold is skipped. Call it between forward passes. Returns false and changes nothing if the block size is
    // not supported. Throws std::bad_alloc.
    bool set_head_params(const DeltaBlocksRule& rule, const float* thresholds, const float* max_shares, const float* scales, int num_layers,
                         int num_kv_heads, int key_dim);

    void measure(const AttentionProblem& problem, int layer) override;

    // For each layer and KV head, the share of the merged keys' channels that is stored.
    void read_stored_shares(float* shares) const;

    bool reserve(const AttentionProblem& problem, int layer, int stream, int num_threads) override;
    int run(const AttentionProblem& problem, int layer, int stream, const AttentionKernels& kernels, ThreadGroup& threads) override;
    void truncate(int num_slots) override;
    size_t scratch_bytes() const override;

    const ScoreCounts& counts() const { return counts_; }

private:
    struct Layer {
        bool is_on = true;
        std::vector<std::vector<BlockStore>> streams;  // per stream and KV head
    };

    bool applies_to(const AttentionProblem& problem, int layer) const;
    bool starts_pass(const AttentionProblem& problem, int layer, int stream);
    MergeRule merge_rule(int layer, int kv_head) const;
    bool is_refining() const { return refines(rule_.refine); }
    void prepare(const AttentionProblem& problem, const std::vector<BlockStore>& heads);
    void start_tokens(const AttentionProblem& problem, int first_token, int num_tokens);
    void refine_tokens(const AttentionKernels& kernels, ThreadGroup& threads);
    void count(const AttentionProblem& problem, const std::vector<BlockStore>& heads);
    void count_refined(const AttentionProblem& problem);

    BlockRefiner refiner_;
    DeltaBlocksRule rule_{};
    std::vector<Layer> layers_;
    std::vector<float> thresholds_, max_shares_, scales_;
    std::vector<BlockStoreView> stores_;
    MergedKeys merged_keys_{};
    AttentionProblem problem_{};
    ScoreCounts counts_{};
    std::atomic<int> num_refined_{0};  // by the last token so far
    int first_position_ = 0;           // the slot of the batch's first token
    bool runs_ = false;
};

// As in delta_rows.h, for DeltaBlocksPolicy. Its errors come with the share of channels that each layer and KV head
// stored. The counts are totals over all passes, and zeros while another policy is current.
LOWTIDE_API int lowtide_policy_set_delta_blocks(CurrentPolicy* policy, const DeltaBlocksRule* rule, const float* thresholds,
                                                const float* max_shares, const float* scales, int num_layers, int num_kv_heads,
                                                int key_dim);
LOWTIDE_API void lowtide_policy_start_delta_blocks(CurrentPolicy* policy, int refine);
LOWTIDE_API int lowtide_policy_measure_delta_blocks(CurrentPolicy* policy);
LOWTIDE_API void lowtide_policy_read_delta_blocks_errors(const CurrentPolicy* policy, float* errors, float* squares, float* shares);
LOWTIDE_API ScoreCounts lowtide_policy_score_counts(const CurrentPolicy* policy);

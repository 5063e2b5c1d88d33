#pragma once

// The `delta` policy by rows: whole tokens that are similar share one key and one value.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/flash.h"
#include "attention/problem.h"
#include "c_api.h"
#include "sparse/delta/clustered_keys.h"
#include "sparse/error_stats.h"
#include "sparse/policy.h"
#include "sparse/refine.h"
#include "threads.h"

// Refines scores: a cluster that gets more than a share of a head's softmax weight is replaced by its keys, each with
// its own score and value, for all heads of the KV head.
class ClusterRefiner {
public:
    // Reserves room for problems of up to `max_keys` keys and clusters. Throws std::bad_alloc.
    void reserve(const AttentionProblem& problem, int max_keys, int num_threads);

    // Has one KV head's problem of a few tokens record its scores here.
    void record(AttentionProblem& problem, int kv_head) { recorder_.record(problem, kv_head); }

    // Refines the clusters to which `token` gave more than `threshold` of a head's weight in the recorded problem,
    // which begins at `first_token`. Returns the number of their keys. Called by one of the threads that `attend` has
    // reserved.
    int refine(const AttentionProblem& problem, const ClusteredKeys& store, int kv_head, int first_token, int token, float threshold,
               const AttentionKernels& kernels, FlashAttention& attend, int thread);

    size_t num_bytes() const { return recorder_.num_bytes() + scratch_.num_bytes(); }

private:
    ScoreRecorder recorder_;
    MergeScratch scratch_;
};

// Settings of all layers. Python fills it in.
struct DeltaRowsRule {
    int32_t window;           // the last keys of each token, its own among them, are never clustered
    int32_t num_sink_tokens;  // nor are the first keys of the cache
    float refine;             // clusters above this share of a head's weight are refined in decoding; 0: none
};

// Attention over clusters. Behind the window, similar keys share one score and one value (ClusteredKeys), so the
// others cost neither a multiplication nor a read. The policy needs a batch whose tokens see a prefix of the cache,
// each one slot more than the token before; it skips others.
class DeltaRowsPolicy : public MeasuredPolicy {
public:
    using MeasuredPolicy::MeasuredPolicy;

    // For each layer and KV head, (num_layers, num_kv_heads): the number of clusters of a page (kPageKeys: not
    // clustered), the score bias (ClusterRule) for unscaled scores, and the channel scales (..., key_dim). A layer
    // without clustered heads is skipped. Call it between forward passes. Returns false and changes nothing if a page
    // cannot have so many clusters. Throws std::bad_alloc.
    bool set_head_params(const DeltaRowsRule& rule, const uint8_t* num_clusters, const float* score_bias, const float* scales,
                         int num_layers, int num_kv_heads, int key_dim);

    void measure(const AttentionProblem& problem, int layer) override;
    bool reserve(const AttentionProblem& problem, int layer, int stream, int num_threads) override;

    // Counts keys and clusters, as a mean over heads.
    int run(const AttentionProblem& problem, int layer, int stream, const AttentionKernels& kernels, ThreadGroup& threads) override;
    void truncate(int num_slots) override;
    size_t scratch_bytes() const override;

private:
    struct Layer {
        bool is_clustered = false;
        std::vector<std::vector<ClusteredKeys>> streams;  // per stream and KV head
    };

    bool is_refining() const { return refines(rule_.refine); }
    bool starts_pass(const AttentionProblem& problem, int layer, int stream);
    bool applies_to(const AttentionProblem& problem, int layer) const;
    ClusterRule cluster_rule(const AttentionProblem& problem, int layer, int kv_head) const;
    int num_pages_before(int position) const;
    void refine(const AttentionProblem& problem, const std::vector<ClusteredKeys>& heads, int first_token, int num_tokens,
                const AttentionKernels& kernels, int thread, int num_threads);
    void prepare(const AttentionProblem& problem, const ClusteredKeys& store, int kv_head, int first_token, int num_tokens);

    ClusterRefiner refiner_;
    DeltaRowsRule rule_{};
    std::vector<Layer> layers_;
    std::vector<uint8_t> num_clusters_;
    std::vector<float> score_bias_, scales_;
    std::vector<uint16_t> mask_;
    AttentionProblem head_problem_{};
    std::atomic<int> num_refined_{0};  // by the last token
    int first_position_ = 0;           // the slot of the batch's first token
    bool runs_ = false;
};

// Makes DeltaRowsPolicy the current policy and sets its parameters (`set_head_params`) between forward passes. Returns
// 1 if there is no memory, 2 if a page cannot have so many clusters. The policy is on from `start_delta_rows` to the
// next `start_pass`, and with `refine` it refines scores; or it measures errors (`measure_delta_rows`, 1 if there is no
// memory). While another policy is current, all but the first do nothing.
LOWTIDE_API int lowtide_policy_set_delta_rows(CurrentPolicy* policy, const DeltaRowsRule* rule, const uint8_t* num_clusters,
                                              const float* score_bias, const float* scales, int num_layers, int num_kv_heads, int key_dim);
LOWTIDE_API void lowtide_policy_start_delta_rows(CurrentPolicy* policy, int refine);
LOWTIDE_API int lowtide_policy_measure_delta_rows(CurrentPolicy* policy);
LOWTIDE_API void lowtide_policy_read_delta_rows_errors(const CurrentPolicy* policy, float* errors, float* squares);

#pragma once

// The first pass of GemFilter (arXiv 2409.17422): the attention scores of a prompt's last tokens in one layer.

#include <vector>

#include "attention/flash.h"
#include "attention/problem.h"
#include "threads.h"

// How the tokens and heads of a layer become one score per key. Python fills it in.
struct ScoreRule {
    int32_t num_tokens;   // the last tokens of the prompt that count
    int32_t use_softmax;  // the softmax weight of a key in a head, or its raw score
    int32_t use_maximum;  // the maximum over tokens and heads, or the sum
};

// Scores every key of a prompt in one layer. The graph stops after that layer's attention, which is computed for no
// other token.
class GemScorer {
public:
    // From the next forward pass on. `is_last`: the prompt ends with that pass, so it is scored.
    void start(int layer, const ScoreRule& rule, bool is_last) { layer_ = layer, rule_ = rule, is_last_ = is_last, num_scored_ = 0; }
    void stop() { layer_ = kNoLayer; }

    // Whether forward passes end with this layer.
    bool ends_at(int layer) const { return layer != kNoLayer && layer == layer_; }

    // Allocates scratch before the threads run. Returns false if there is no memory.
    bool reserve(const AttentionProblem& problem, int num_threads);

    // Runs in place of attention.
    void run(const AttentionProblem& problem, const AttentionKernels& kernels, ThreadGroup& threads);

    // One score per key of the last pass. None if that pass did not end with the prompt.
    const float* scores() const { return scores_.data(); }
    int num_scored() const { return num_scored_; }
    size_t scratch_bytes() const {
        return flash_.scratch_bytes() + sizeof(float) * (head_scores_.size() + softmax_stats_.size() + scores_.size());
    }

private:
    static constexpr int kNoLayer = -1;

    void reduce(const AttentionProblem& token, int begin, int end);

    int layer_ = kNoLayer, num_scored_ = 0;
    ScoreRule rule_{};
    bool is_last_ = false;
    FlashAttention flash_;
    std::vector<float> head_scores_, softmax_stats_, scores_;  // of one token: (heads, keys), (heads, 2); (keys)
};

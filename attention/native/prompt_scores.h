#pragma once

#include <vector>

#include "attend.h"
#include "attention_problem.h"
#include "barrier.h"
#include "team.h"

// How the rows and heads of a layer become one score a key. Python fills it.
struct ScoreRule {
    int32_t num_rows;     // the last ones of the prompt
    int32_t use_softmax;  // what a key weighs in a head's softmax, or the raw score
    int32_t use_maximum;  // over rows and heads, or the sum
};

// What the last rows of a prompt attend to in one layer, as a score for every key: GemFilter's first pass, with
// the graph stopped behind that layer's attention, which is computed for no other row.
class PromptScores {
public:
    // From the next pass on; `is_last` where the prompt ends with it and scores are wanted.
    void start(int layer, const ScoreRule& rule, bool is_last) { layer_ = layer, rule_ = rule, is_last_ = is_last, num_scored_ = 0; }
    void stop() { layer_ = kNoLayer; }

    // Whether passes end with this layer.
    bool end_with(int layer) const { return layer != kNoLayer && layer == layer_; }

    // Makes room for the problem before any thread runs; false where there is no memory for it.
    bool reserve(const AttentionProblem& problem, int num_threads);

    // Instead of attention. The second form is called by each of `num_threads` threads.
    void run(const AttentionProblem& problem, const KernelSet& kernels, Team& team);
    void run(const AttentionProblem& problem, const KernelSet& kernels, int thread, int num_threads);

    // One for each key of the last pass's cache; none where it did not come so far.
    const float* scores() const { return scores_.data(); }
    int num_scored() const { return num_scored_; }
    size_t scratch_bytes() const { return attend_.scratch_bytes() + sizeof(float) * (lines_.size() + totals_.size() + scores_.size()); }

private:
    static constexpr int kNoLayer = -1;

    void reduce(const AttentionProblem& row, int begin, int end);

    int layer_ = kNoLayer, num_scored_ = 0;
    ScoreRule rule_{};
    bool is_last_ = false;
    Attend attend_;
    std::vector<float> lines_, totals_, scores_;  // of one row: (heads, keys), (heads, 2); (keys)
    Barrier barrier_;
};

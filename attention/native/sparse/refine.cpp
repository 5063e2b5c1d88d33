// Records scores, and replaces the contribution of keys to a result.

#include "sparse/refine.h"

#include <algorithm>
#include <cmath>

#include "containers.h"
#include "simd.h"

bool RecordedScores::exceeds_threshold(int key) const {
    for (int head = 0; head < num_heads; ++head)
        if (scores[size_t(head) * stride + key] > thresholds[head]) return true;
    return false;
}

bool RecordedScores::block_exceeds_threshold(int first) const {
    Ints found = {};
    for (int head = 0; head < num_heads; ++head) {
        const float* head_scores = scores + size_t(head) * stride + first;
        const Floats bound = splat(thresholds[head]);
        for (int i = 0; i < kBlockKeys; i += W) found |= load(head_scores + i) > bound;
    }
    for (int lane = 0; lane < W; ++lane)
        if (found[lane] != 0) return true;
    return false;
}

void RecordedScores::replace(const AttentionProblem& head_problem, const float* removed, const float* added) const {
    for (int head = 0; head < num_heads; ++head, removed += partial_floats(head_problem), added += partial_floats(head_problem)) {
        auto* out = reinterpret_cast<float*>(head_problem.out + head * head_problem.out_head_stride);
        const float largest = std::max(softmax_stats[2 * head], added[0]);
        const float before = std::exp(softmax_stats[2 * head] - largest) / softmax_stats[2 * head + 1];
        const float removed_factor = std::exp(removed[0] - largest), added_factor = std::exp(added[0] - largest);
        const float sum = before - removed[1] * removed_factor + added[1] * added_factor;
        if (!(sum > 0.0f)) continue;  // nothing but rounding errors is left
        for (int d = 0; d < head_problem.value_dim; ++d)
            out[d] = (out[d] * before - removed[2 + d] * removed_factor + added[2 + d] * added_factor) / sum;
    }
}

void ScoreRecorder::reserve(int num_problems, int num_tokens, int num_heads, int num_keys) {
    stride_ = std::max(stride_, padded_to_blocks(num_keys));
    queries_per_problem_ = std::max(queries_per_problem_, size_t(std::min(num_tokens, kMaxTokens)) * num_heads);
    ensure_size(scores_, num_problems * queries_per_problem_ * stride_),
        ensure_size(softmax_stats_, num_problems * queries_per_problem_ * 2);
    ensure_size(thresholds_, num_problems * queries_per_problem_);
}

void ScoreRecorder::record(AttentionProblem& problem, int index) {
    problem.scores = scores_.data() + index * queries_per_problem_ * stride_,
    problem.softmax_stats = softmax_stats_.data() + index * queries_per_problem_ * 2;
    problem.first_scored_token = 0, problem.scores_stride = stride_;
}

RecordedScores ScoreRecorder::scores_of(int index, int token, int total_heads, int first_head, int num_heads, float threshold) {
    const size_t query = index * queries_per_problem_ + size_t(token) * total_heads + first_head;
    const float* softmax_stats = softmax_stats_.data() + query * 2;
    float* thresholds = thresholds_.data() + query;
    for (int head = 0; head < num_heads; ++head)
        thresholds[head] = softmax_stats[2 * head] + std::log(threshold / softmax_stats[2 * head + 1]);
    return {scores_.data() + query * stride_, softmax_stats, thresholds, num_heads, stride_};
}

AttentionProblem view_of_head(const AttentionProblem& p, int kv_head, int token) {
    AttentionProblem view = p;
    view.q += token * p.q_token_stride + kv_head * p.group_size() * p.q_head_stride;
    view.out += token * p.out_token_stride + kv_head * p.group_size() * p.out_head_stride;
    view.k += kv_head * p.k_head_stride, view.v += kv_head * p.v_head_stride;
    view.mask += token * p.mask_token_stride;
    view.num_tokens = 1, view.num_heads = p.group_size(), view.num_kv_heads = 1;
    view.sinks = nullptr, view.scores = nullptr, view.merged_keys = nullptr;
    return view;
}

#include "watched_scores.h"

#include <algorithm>
#include <cmath>

#include "grown.h"

#ifndef VECTOR_FLOATS
#define VECTOR_FLOATS 4
#endif
#include "vectors.h"

bool SeenByHeads::favour(int key) const {
    for (int head = 0; head < num_heads; ++head)
        if (scores[size_t(head) * stride + key] > least[head]) return true;
    return false;
}

bool SeenByHeads::favour_some(int first) const {
    Ints found = {};
    for (int head = 0; head < num_heads; ++head) {
        const float* of_head = scores + size_t(head) * stride + first;
        const Floats bound = splat(least[head]);
        for (int i = 0; i < kBlockKeys; i += W) found |= load(of_head + i) > bound;
    }
    for (int lane = 0; lane < W; ++lane)
        if (found[lane] != 0) return true;
    return false;
}

void SeenByHeads::exchange(const AttentionProblem& of_row, const float* less, const float* more) const {
    for (int head = 0; head < num_heads; ++head, less += partial_floats(of_row), more += partial_floats(of_row)) {
        auto* out = reinterpret_cast<float*>(of_row.out + head * of_row.out_head_stride);
        const float largest = std::max(totals[2 * head], more[0]);
        const float before = std::exp(totals[2 * head] - largest) / totals[2 * head + 1];
        const float of_less = std::exp(less[0] - largest), of_more = std::exp(more[0] - largest);
        const float sum = before - less[1] * of_less + more[1] * of_more;
        if (!(sum > 0.0f)) continue;  // nothing but rounding is left
        for (int d = 0; d < of_row.value_size; ++d) out[d] = (out[d] * before - less[2 + d] * of_less + more[2 + d] * of_more) / sum;
    }
}

void WatchedScores::reserve(int num_problems, int num_rows, int num_heads, int num_keys) {
    stride_ = std::max(stride_, padded_to_blocks(num_keys));
    problem_lines_ = std::max(problem_lines_, size_t(std::min(num_rows, kMostRows)) * num_heads);
    grow(scores_, num_problems * problem_lines_ * stride_), grow(totals_, num_problems * problem_lines_ * 2);
    grow(least_, num_problems * problem_lines_);
}

void WatchedScores::watch(AttentionProblem& problem, int index) {
    problem.scores = scores_.data() + index * problem_lines_ * stride_, problem.totals = totals_.data() + index * problem_lines_ * 2;
    problem.first_scored_row = 0, problem.scores_stride = stride_;
}

SeenByHeads WatchedScores::seen(int index, int row, int all_heads, int first_head, int num_heads, float share) {
    const size_t line = index * problem_lines_ + size_t(row) * all_heads + first_head;
    const float* totals = totals_.data() + line * 2;
    float* least = least_.data() + line;
    for (int head = 0; head < num_heads; ++head) least[head] = totals[2 * head] + std::log(share / totals[2 * head + 1]);
    return {scores_.data() + line * stride_, totals, least, num_heads, stride_};
}

AttentionProblem of_row_and_head(const AttentionProblem& p, int kv_head, int row) {
    AttentionProblem own = p;
    own.q += row * p.q_row_stride + kv_head * p.group_size() * p.q_head_stride;
    own.out += row * p.out_row_stride + kv_head * p.group_size() * p.out_head_stride;
    own.k += kv_head * p.k_head_stride, own.v += kv_head * p.v_head_stride;
    own.mask += row * p.mask_row_stride;
    own.num_rows = 1, own.num_heads = p.group_size(), own.num_kv_heads = 1;
    own.sinks = nullptr, own.scores = nullptr, own.states = nullptr;
    return own;
}

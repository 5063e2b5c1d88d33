#include "prompt_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

namespace {

AttentionProblem row_of(AttentionProblem p, int row) {
    p.q += row * p.q_row_stride, p.mask += row * p.mask_row_stride, p.out += row * p.out_row_stride;
    p.num_rows = 1, p.first_scored_row = 0, p.rounded = 0;
    return p;
}

}  // namespace

bool PromptScores::reserve(const AttentionProblem& p, int num_threads) {
    const size_t num_keys = padded_to_blocks(p.num_keys);
    try {
        if (lines_.size() < p.num_heads * num_keys) lines_.resize(p.num_heads * num_keys);
        if (totals_.size() < 2 * size_t(p.num_heads)) totals_.resize(2 * size_t(p.num_heads));
        if (scores_.size() < num_keys) scores_.resize(num_keys);
    } catch (const std::bad_alloc&) {
        return false;
    }
    return attend_.reserve(row_of(p, 0), num_threads);
}

void PromptScores::run(const AttentionProblem& p, const KernelSet& kernels, Team& team) {
    if (!is_last_) return;
    const int num_workers = attend_.num_workers(team.num_threads);
    const bool from_nothing = rule_.use_maximum && !rule_.use_softmax;
    team.once([&] { std::fill_n(scores_.begin(), p.num_keys, from_nothing ? -std::numeric_limits<float>::infinity() : 0.0f); });
    for (int i = std::max(p.num_rows - rule_.num_rows, 0); i < p.num_rows; ++i) {
        AttentionProblem row = row_of(p, i);
        row.scores = lines_.data(), row.scores_stride = padded_to_blocks(p.num_keys), row.totals = totals_.data();
        attend_.run(row, kernels, team);
        team.all([&](int thread) {
            if (thread < num_workers) reduce(row, p.num_keys * thread / num_workers, p.num_keys * (thread + 1) / num_workers);
        }, [] {});  // the next row's lines take the place of these
    }
    team.once([&] { num_scored_ = p.num_keys; });
}

void PromptScores::run(const AttentionProblem& p, const KernelSet& kernels, int thread, int num_threads) {
    ThreadOfTeam team(barrier_, thread, num_threads);
    run(p, kernels, team);
}

void PromptScores::reduce(const AttentionProblem& row, int begin, int end) {
    const auto* mask = reinterpret_cast<const uint16_t*>(row.mask);
    for (int head = 0; head < row.num_heads; ++head) {
        const float* line = lines_.data() + size_t(head) * row.scores_stride;
        const float largest = totals_[2 * head], inverse = totals_[2 * head + 1];
        for (int j = begin; j < end; ++j) {
            if (mask[j] == kHiddenKey) continue;
            const float score = rule_.use_softmax ? std::exp(line[j] - largest) * inverse : line[j];
            scores_[j] = rule_.use_maximum ? std::max(scores_[j], score) : scores_[j] + score;
        }
    }
}

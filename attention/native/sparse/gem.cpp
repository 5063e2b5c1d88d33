// Scores a prompt's keys in one layer.

#include "sparse/gem.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

namespace {

AttentionProblem token_view(AttentionProblem p, int token) {
    p.q += token * p.q_token_stride, p.mask += token * p.mask_token_stride, p.out += token * p.out_token_stride;
    p.num_tokens = 1, p.first_scored_token = 0, p.use_bf16 = 0;
    return p;
}

}  // namespace

bool GemScorer::reserve(const AttentionProblem& p, int num_threads) {
    const size_t num_keys = padded_to_blocks(p.num_keys);
    try {
        if (head_scores_.size() < p.num_heads * num_keys) head_scores_.resize(p.num_heads * num_keys);
        if (softmax_stats_.size() < 2 * size_t(p.num_heads)) softmax_stats_.resize(2 * size_t(p.num_heads));
        if (scores_.size() < num_keys) scores_.resize(num_keys);
    } catch (const std::bad_alloc&) {
        return false;
    }
    return flash_.reserve(token_view(p, 0), num_threads);
}

void GemScorer::run(const AttentionProblem& p, const AttentionKernels& kernels, ThreadGroup& threads) {
    if (!is_last_) return;
    const int num_workers = flash_.num_workers(threads.num_threads);
    const bool from_nothing = rule_.use_maximum && !rule_.use_softmax;
    threads.single([&] { std::fill_n(scores_.begin(), p.num_keys, from_nothing ? -std::numeric_limits<float>::infinity() : 0.0f); });
    for (int i = std::max(p.num_tokens - rule_.num_tokens, 0); i < p.num_tokens; ++i) {
        AttentionProblem token = token_view(p, i);
        token.scores = head_scores_.data(), token.scores_stride = padded_to_blocks(p.num_keys), token.softmax_stats = softmax_stats_.data();
        flash_.run(token, kernels, threads);
        threads.parallel_for([&](int thread) {
            if (thread < num_workers) reduce(token, p.num_keys * thread / num_workers, p.num_keys * (thread + 1) / num_workers);
        }, [] {});  // the next token overwrites these scores
    }
    threads.single([&] { num_scored_ = p.num_keys; });
}

void GemScorer::reduce(const AttentionProblem& token, int begin, int end) {
    const auto* mask = reinterpret_cast<const uint16_t*>(token.mask);
    for (int head = 0; head < token.num_heads; ++head) {
        const float* head_scores = head_scores_.data() + size_t(head) * token.scores_stride;
        const float largest = softmax_stats_[2 * head], inverse = softmax_stats_[2 * head + 1];
        for (int j = begin; j < end; ++j) {
            if (mask[j] == kMaskedKey) continue;
            const float score = rule_.use_softmax ? std::exp(head_scores[j] - largest) * inverse : head_scores[j];
            scores_[j] = rule_.use_maximum ? std::max(scores_[j], score) : scores_[j] + score;
        }
    }
}

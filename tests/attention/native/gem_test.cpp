// The scores of a prompt's keys against plain arithmetic in double: every rule, tokens and keys that nobody sees,
// fewer tokens than the rule takes and none, and bitwise with other numbers of threads.

#include "sparse/gem.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "checks.h"
#include "random_problem.h"
#include "random_threads.h"

namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

// Masks all keys of a token or a key for all tokens, and gives others a bias.
void change_mask(Case& c) {
    const AttentionProblem& p = c.p;
    const auto hide_row = [&](int token) { std::fill_n(c.mask.get() + size_t(token) * p.num_keys, p.num_keys, kMaskedKey); };
    constexpr uint16_t kMinusHalf = 0xb800;
    for (int i = 0; i < 20; ++i) c.mask[size_t(pick(0, p.num_tokens - 1)) * p.num_keys + pick(0, p.num_keys - 1)] = kMinusHalf;
    const int hidden = pick(0, p.num_keys - 1);
    for (int token = 0; token < p.num_tokens; ++token) c.mask[size_t(token) * p.num_keys + hidden] = kMaskedKey;
    if (pick(0, 2) == 0) hide_row(p.num_tokens - 1);
    if (pick(0, 5) == 0)
        for (int token = 0; token < p.num_tokens; ++token) hide_row(token);
}

void add_head(const Case& c, const ScoreRule& rule, int token, int head, std::vector<double>& scores) {
    const AttentionProblem& p = c.p;
    std::vector<double> head_scores(p.num_keys, kNothing);
    double total = p.sinks == nullptr ? 0 : std::exp(double(p.sinks[head]) - 40);
    for (int key = 0; key < p.num_keys; ++key) {
        if (c.mask_of(token, key) == kMaskedKey) continue;
        head_scores[key] = c.score(token, head, key) + fp16_to_float(c.mask_of(token, key));
        total += std::exp(head_scores[key] - 40);
    }
    for (int key = 0; key < p.num_keys; ++key) {
        if (head_scores[key] == kNothing) continue;
        const double score = rule.use_softmax ? std::exp(head_scores[key] - 40) / total : head_scores[key];
        scores[key] = rule.use_maximum ? std::max(scores[key], score) : scores[key] + score;
    }
}

std::vector<double> expected(const Case& c, const ScoreRule& rule) {
    std::vector<double> scores(c.p.num_keys, rule.use_maximum && !rule.use_softmax ? kNothing : 0.0);
    for (int token = std::max(c.p.num_tokens - rule.num_tokens, 0); token < c.p.num_tokens; ++token)
        for (int head = 0; head < c.p.num_heads; ++head) add_head(c, rule, token, head, scores);
    return scores;
}

// Threads beyond the reserved number take no part.
void run(GemScorer& scorer, const Case& c, const AttentionKernels& kernels, int num_threads, int num_reserved) {
    require(scorer.reserve(c.p, num_reserved), "there is no memory");
    on_thread_group(num_threads, [&](ThreadGroup& threads) { scorer.run(c.p, kernels, threads); });
}

void check(const Case& c, const ScoreRule& rule, const AttentionKernels& kernels) {
    GemScorer alone;
    alone.start(3, rule, true);
    run(alone, c, kernels, 1, 1);
    require(alone.num_scored() == c.p.num_keys, "%d of %d keys are scored", alone.num_scored(), c.p.num_keys);
    const std::vector<double> reference = expected(c, rule);
    for (int key = 0; key < c.p.num_keys; ++key) {
        const double found = alone.scores()[key], want = reference[key];
        require(found == want || std::fabs(found - want) <= 2e-4 * (1 + std::fabs(want)),
                "%s: key %d scores %g, expected %g", kernels.name, key, found, want);
    }
    for (int num_threads : {2, 3}) {
        GemScorer shared;
        shared.start(3, rule, true);
        run(shared, c, kernels, num_threads, 2);
        require(std::memcmp(alone.scores(), shared.scores(), sizeof(float) * c.p.num_keys) == 0, "%s: %d threads change the scores",
                kernels.name, num_threads);
        shared.start(3, rule, false);
        run(shared, c, kernels, num_threads, 2);
        require(shared.num_scored() == 0, "an unfinished prompt is scored");
    }
}

void check_layers() {
    GemScorer scorer;
    require(!scorer.ends_at(0) && !scorer.ends_at(-1), "passes end before anything is started");
    scorer.start(3, {}, true);
    require(scorer.ends_at(3) && !scorer.ends_at(2) && !scorer.ends_at(-1), "passes end with another layer");
    scorer.stop();
    require(!scorer.ends_at(3) && !scorer.ends_at(-1), "passes end once they are whole again");
}

}  // namespace

int main() {
    int num_checked = 0;
    check_layers();
    for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
        const AttentionKernels* kernels = find_attention_kernels(name);
        if (kernels == nullptr) continue;
        for (int i = 0; i < 12; ++i, ++num_checked) {
            Case c = random_case(false);
            change_mask(c);
            const int num_tokens = i == 0 ? 0 : pick(1, 12);
            check(c, {num_tokens, i % 2, i / 2 % 2}, *kernels);
        }
    }
    std::printf("%d prompts agree\n", num_checked);
    return num_checked == 0;
}

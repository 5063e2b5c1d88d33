// The scores of a prompt's keys against plain double arithmetic: every rule, rows and keys that nobody sees, fewer
// rows than the rule wants and none, and bit for bit with other numbers of threads.

#include "prompt_scores.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "checks.h"
#include "random_problem.h"

namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

// Hides a row's keys or a key from all rows, and has the mask add something to others.
void change_mask(Case& c) {
    const AttentionProblem& p = c.p;
    const auto hide_row = [&](int row) { std::fill_n(c.mask.get() + size_t(row) * p.num_keys, p.num_keys, kHiddenKey); };
    constexpr uint16_t kMinusHalf = 0xb800;
    for (int i = 0; i < 20; ++i) c.mask[size_t(pick(0, p.num_rows - 1)) * p.num_keys + pick(0, p.num_keys - 1)] = kMinusHalf;
    const int hidden = pick(0, p.num_keys - 1);
    for (int row = 0; row < p.num_rows; ++row) c.mask[size_t(row) * p.num_keys + hidden] = kHiddenKey;
    if (pick(0, 2) == 0) hide_row(p.num_rows - 1);
    if (pick(0, 5) == 0)
        for (int row = 0; row < p.num_rows; ++row) hide_row(row);
}

void add_head(const Case& c, const ScoreRule& rule, int row, int head, std::vector<double>& scores) {
    const AttentionProblem& p = c.p;
    std::vector<double> line(p.num_keys, kNothing);
    double total = p.sinks == nullptr ? 0 : std::exp(double(p.sinks[head]) - 40);
    for (int key = 0; key < p.num_keys; ++key) {
        if (c.mask_of(row, key) == kHiddenKey) continue;
        line[key] = c.score(row, head, key) + half_to_float(c.mask_of(row, key));
        total += std::exp(line[key] - 40);
    }
    for (int key = 0; key < p.num_keys; ++key) {
        if (line[key] == kNothing) continue;
        const double score = rule.use_softmax ? std::exp(line[key] - 40) / total : line[key];
        scores[key] = rule.use_maximum ? std::max(scores[key], score) : scores[key] + score;
    }
}

std::vector<double> expected(const Case& c, const ScoreRule& rule) {
    std::vector<double> scores(c.p.num_keys, rule.use_maximum && !rule.use_softmax ? kNothing : 0.0);
    for (int row = std::max(c.p.num_rows - rule.num_rows, 0); row < c.p.num_rows; ++row)
        for (int head = 0; head < c.p.num_heads; ++head) add_head(c, rule, row, head, scores);
    return scores;
}

// Threads beyond those that room was made for take no part.
void run(PromptScores& prompt, const Case& c, const KernelSet& kernels, int num_threads, int num_reserved) {
    require(prompt.reserve(c.p, num_reserved), "there is no memory");
    on_threads(num_threads, [&](int thread) { prompt.run(c.p, kernels, thread, num_threads); });
}

void check(const Case& c, const ScoreRule& rule, const KernelSet& kernels) {
    PromptScores alone;
    alone.start(3, rule, true);
    run(alone, c, kernels, 1, 1);
    require(alone.num_scored() == c.p.num_keys, "%d of %d keys are scored", alone.num_scored(), c.p.num_keys);
    const std::vector<double> wanted = expected(c, rule);
    for (int key = 0; key < c.p.num_keys; ++key) {
        const double found = alone.scores()[key], want = wanted[key];
        require(found == want || std::fabs(found - want) <= 2e-4 * (1 + std::fabs(want)),
                "%s: key %d scores %g, %g is wanted", kernels.name, key, found, want);
    }
    for (int num_threads : {2, 3}) {
        PromptScores shared;
        shared.start(3, rule, true);
        run(shared, c, kernels, num_threads, 2);
        require(std::memcmp(alone.scores(), shared.scores(), sizeof(float) * c.p.num_keys) == 0, "%s: %d threads change the scores",
                kernels.name, num_threads);
        shared.start(3, rule, false);
        run(shared, c, kernels, num_threads, 2);
        require(shared.num_scored() == 0, "a prompt that goes on is scored");
    }
}

void check_layers() {
    PromptScores prompt;
    require(!prompt.end_with(0) && !prompt.end_with(-1), "passes end before anything is started");
    prompt.start(3, {}, true);
    require(prompt.end_with(3) && !prompt.end_with(2) && !prompt.end_with(-1), "passes end with another layer");
    prompt.stop();
    require(!prompt.end_with(3) && !prompt.end_with(-1), "passes end once they are whole again");
}

}  // namespace

int main() {
    int num_checked = 0;
    check_layers();
    for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
        const KernelSet* kernels = find_kernels(name);
        if (kernels == nullptr) continue;
        for (int i = 0; i < 12; ++i, ++num_checked) {
            Case c = some_case(false);
            change_mask(c);
            const int num_rows = i == 0 ? 0 : pick(1, 12);
            check(c, {num_rows, i % 2, i / 2 % 2}, *kernels);
        }
    }
    std::printf("%d prompts agree\n", num_checked);
    return num_checked == 0;
}

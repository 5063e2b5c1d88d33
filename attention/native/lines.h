#pragma once

// Lines (query heads of rows) that see the same keys of a block, and their online softmax. Included by the
// kernels.

#include <cmath>
#include <cstring>

#include "attention_problem.h"
#include "vectors.h"

namespace {

constexpr int kDirectLines = 8;  // so few read the cache's rows themselves

struct Lines {
    int count;
    const float* q[kDirectLines];
    const float* bias[kDirectLines];
    float* partials[kDirectLines];
    float* exported[kDirectLines];  // where their scores are wanted, or null
};

// Scores of N lines to weights under each partial's running maximum; writes what its older sums are
// multiplied by. The lines go step by step together: alone, each would wait for its own sums across lanes.
template <int N> void soften(const AttentionProblem& p, const Lines& lines, float* scores, float* factors) {
    float largest[N];
    Floats most[N];
    for (int n = 0; n < N; ++n) {
        float* line = scores + n * kBlockKeys;
        const float* bias = lines.bias[n];
        const bool is_capped = p.softcap != 0.0f;
        if (is_capped)
            for (int j = 0; j < kBlockKeys; ++j) line[j] = p.softcap * std::tanh(line[j] * p.scale / p.softcap) + bias[j];
        most[n] = splat(lines.partials[n][0]);
        for (int j = 0; j < kBlockKeys; j += W) {
            const Floats some = is_capped ? load(line + j) : load(line + j) * p.scale + load(bias + j);
            store(line + j, some);
            most[n] = some > most[n] ? some : most[n];
        }
        if (lines.exported[n] != nullptr) std::memcpy(lines.exported[n], line, sizeof(float) * kBlockKeys);
    }
    for (int n = 0; n < N; ++n) {
        largest[n] = largest_of_lanes(most[n]);
        if (largest[n] == kMinusInfinity) largest[n] = 0.0f;  // only with NaN in the scores
    }
    Floats sums[N];
    for (int n = 0; n < N; ++n) {
        sums[n] = Floats{};
        for (int j = 0; j < kBlockKeys; j += W) {
            const Floats weight = exp_nonpositive(load(scores + n * kBlockKeys + j) - largest[n]);
            store(scores + n * kBlockKeys + j, weight);
            sums[n] += weight;
        }
    }
    for (int n = 0; n < N; ++n) {
        float* partial = lines.partials[n];
        factors[n] = partial[0] == kMinusInfinity ? 0.0f : partial[0] == largest[n] ? 1.0f : exp_one(partial[0] - largest[n]);
        partial[1] = partial[1] * factors[n] + sum_of_lanes(sums[n]);
        partial[0] = largest[n];
    }
}

}  // namespace

// Attention over states in passes of any size, with rows taken back on the way: bit for bit what one pass makes of the
// same cache, with any number of threads, whoever owns them, and whatever is sent; with no threshold what dense attention
// makes of it. Measured passes change nothing.

#include "state_attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "checks.h"
#include "random_problem.h"
#include "some_team.h"

namespace {

constexpr int kNumCells = 448;

struct Cache {
    Case c;
    std::vector<uint16_t> mask;
    std::vector<float> q, out;
    std::vector<float> thresholds, shares, scales;
    StatesRule rule{pick(1, 200), pick(0, 70), pick(0, 2) == 0 ? 1 : 8 * pick(1, 2), pick(0, 1) * 0.02f};

    Cache() {
        do c = some_case(false);
        while (c.p.num_keys < kNumCells);
        c.p.num_keys = kNumCells, c.p.rounded = 0;
        q.resize(size_t(kNumCells) * c.p.num_heads * c.p.key_size), out.resize(size_t(kNumCells) * c.p.num_heads * c.p.value_size);
        for (float& value : q) value = half_to_float(some_half());
        for (int head = 0; head < c.p.num_kv_heads; ++head) {
            thresholds.push_back(0.01f * float(pick(0, 300)));
            shares.push_back(pick(0, 1) == 0 ? 1.0f : 0.01f * float(pick(0, 100)));
        }
        for (int i = 0; i < c.p.num_kv_heads * c.p.key_size; ++i) scales.push_back(0.01f * float(pick(1, 255)));
    }
    AttentionProblem rows(int begin, int end) {
        AttentionProblem p = c.p;
        mask.assign(size_t(end - begin) * kNumCells, kHiddenKey);
        for (int row = begin; row < end; ++row) std::fill_n(mask.begin() + size_t(row - begin) * kNumCells, row + 1, uint16_t(0));
        p.num_rows = end - begin;
        p.mask = reinterpret_cast<const char*>(mask.data()), p.mask_row_stride = sizeof(uint16_t) * kNumCells;
        p.q = reinterpret_cast<const char*>(q.data()) + begin * p.q_row_stride;
        p.out = reinterpret_cast<char*>(out.data()) + begin * p.out_row_stride;
        return p;
    }
};

void set_units(StateAttend& states, const Cache& cache) {
    const bool can_be = states.set_units(cache.rule, cache.thresholds.data(), cache.shares.data(), cache.scales.data(), 1,
                                         cache.c.p.num_kv_heads, cache.c.p.key_size);
    require(can_be, "blocks of %d are refused", cache.rule.block);
    states.start_pass(true, true);
}

void run(StateAttend& states, Cache& cache, const KernelSet& kernels, int begin, int end, int num_threads, bool is_taken = true) {
    const AttentionProblem p = cache.rows(begin, end);
    require(states.reserve(p, 0, 0, num_threads), "there is no memory");
    const auto check_taken = [=](int num_read) {
        require((num_read != StateAttend::kNotTaken) == is_taken, "a pass was taken, or left, against what is expected");
    };
    SomeTeam team(num_threads);
    if (pick(0, 1))
        check_taken(states.run(p, 0, 0, kernels, team));
    else
        on_threads(num_threads, [&](int thread) { check_taken(states.run(p, 0, 0, kernels, thread, num_threads)); });
}

void require_results(const Cache& cache, const std::vector<float>& expected, const char* what) {
    require(std::memcmp(expected.data(), cache.out.data(), sizeof(float) * expected.size()) == 0, "%s, window %d, blocks of %d", what,
            cache.rule.window, cache.rule.block);
}

void check(const KernelSet& kernels) {
    Cache cache;
    StateAttend whole;
    set_units(whole, cache);
    run(whole, cache, kernels, 0, kNumCells, 1);
    const std::vector<float> expected = cache.out;

    StateAttend parts;
    set_units(parts, cache);
    std::fill(cache.out.begin(), cache.out.end(), 0.0f);
    for (int at = 0; at < kNumCells;) {
        const int end = std::min(at + (pick(0, 1) == 0 ? 1 : pick(1, 150)), kNumCells);
        run(parts, cache, kernels, at, end, pick(1, 3));
        at = pick(0, 4) == 0 ? pick(0, end) : end;
    }
    require_results(cache, expected, "passes differ from one pass");

    if (cache.rule.opens > 0.0f) return;  // what is measured is not opened
    parts.start_measuring();
    run(parts, cache, kernels, 100, kNumCells, 2, false);
    parts.measure(cache.rows(100, kNumCells), 0);
    std::vector<float> errors(cache.thresholds.size()), squares(cache.scales.size()), shares(cache.thresholds.size());
    parts.read_measures(errors.data(), squares.data()), parts.read_shares(shares.data());
    require_results(cache, expected, "a measured pass has written");
    for (const float error : errors) require(error >= 0 && error < 1e-9f, "states are %g off themselves", double(error));
    for (const float share : shares) require(share >= 0 && share <= 1, "a share of %g was sent", double(share));
}

void check_dense(const KernelSet& kernels) {
    Cache cache;
    cache.rule.opens = 0.0f;
    Attend dense;
    const AttentionProblem p = cache.rows(0, kNumCells);
    require(dense.reserve(p, 1), "there is no memory");
    dense.run(p, kernels, 0, 1);
    const std::vector<float> expected = cache.out;
    std::fill(cache.thresholds.begin(), cache.thresholds.end(), 0.0f), std::fill(cache.shares.begin(), cache.shares.end(), 1.0f);
    StateAttend states;
    set_units(states, cache);
    run(states, cache, kernels, 0, kNumCells, 2);
    for (size_t i = 0; i < expected.size(); ++i)
        require(std::abs(expected[i] - cache.out[i]) < 1e-4f, "%g is %g with no threshold", double(expected[i]), double(cache.out[i]));
}

}  // namespace

int main() {
    for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
        const KernelSet* kernels = find_kernels(name);
        for (int i = 0; kernels != nullptr && i < 3; ++i) check(*kernels), check_dense(*kernels);
    }
    std::printf("agree\n");
}

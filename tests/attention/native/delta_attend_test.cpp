// Attention over groups in passes of any size, with rows taken back on the way: bit for bit what one pass makes of the same
// cache, with any number of threads, whoever owns them, also where the cache's own cells are given back on the way. Measured
// passes change nothing.

#include "delta_attend.h"

#include <algorithm>
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
    std::vector<uint8_t> num_groups;
    std::vector<float> lifts, scales;
    DeltaRule rule{pick(1, 200), pick(0, 7), pick(0, 1) * 0.02f};

    Cache() {
        do c = some_case(false);
        while (c.p.num_keys < kNumCells);
        c.p.num_keys = kNumCells, c.p.rounded = 0;
        q.resize(size_t(kNumCells) * c.p.num_heads * c.p.key_size), out.resize(size_t(kNumCells) * c.p.num_heads * c.p.value_size);
        for (float& value : q) value = half_to_float(some_half());
        for (int head = 0; head < c.p.num_kv_heads; ++head) num_groups.push_back(uint8_t(pick(8, 64)));
        num_groups[0] = uint8_t(pick(8, 63));
        for (int head = 0; head < c.p.num_kv_heads; ++head) lifts.push_back(1e-5f * float(pick(0, 1000)));
        for (int i = 0; i < c.p.num_kv_heads * c.p.key_size; ++i) scales.push_back(float(pick(1, 255)));
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

void set_units(DeltaAttend& delta, const Cache& cache) {
    delta.set_units(cache.rule, cache.num_groups.data(), cache.lifts.data(), cache.scales.data(), 1, cache.c.p.num_kv_heads,
                    cache.c.p.key_size);
    delta.start_pass(true, true);
}

void run(DeltaAttend& delta, Cache& cache, const KernelSet& kernels, int begin, int end, int num_threads, bool is_taken = true) {
    const AttentionProblem p = cache.rows(begin, end);
    require(delta.reserve(p, 0, 0, num_threads), "there is no memory");
    const auto check_taken = [=](int num_read) {
        require((num_read != DeltaAttend::kNotTaken) == is_taken, "a pass was taken, or left, against what is expected");
    };
    SomeTeam team(num_threads);
    if (pick(0, 1))
        check_taken(delta.run(p, 0, 0, kernels, team));
    else
        on_threads(num_threads, [&](int thread) { check_taken(delta.run(p, 0, 0, kernels, thread, num_threads)); });
}

void check(const KernelSet& kernels) {
    Cache cache;
    DeltaAttend whole;
    set_units(whole, cache);
    run(whole, cache, kernels, 0, kNumCells, 1);
    const std::vector<float> expected = cache.out;

    DeltaAttend parts;
    set_units(parts, cache);
    std::fill(cache.out.begin(), cache.out.end(), 0.0f);
    for (int at = 0; at < kNumCells;) {
        const int end = std::min(at + (pick(0, 1) == 0 ? 1 : pick(1, 150)), kNumCells);
        run(parts, cache, kernels, at, end, pick(1, 3));
        at = pick(0, 4) == 0 ? pick(0, end) : end;
    }
    require(std::memcmp(expected.data(), cache.out.data(), sizeof(float) * expected.size()) == 0, "passes differ from one pass, window %d",
            cache.rule.window);

    if (cache.rule.opens > 0.0f) return;  // what is measured is not opened
    parts.start_measuring();
    run(parts, cache, kernels, 100, kNumCells, 2, false);
    parts.measure(cache.rows(100, kNumCells), 0);
    std::vector<float> errors(cache.num_groups.size()), squares(cache.scales.size());
    parts.read_measures(errors.data(), squares.data());
    require(std::memcmp(expected.data(), cache.out.data(), sizeof(float) * expected.size()) == 0, "a measured pass has written");
    for (const float error : errors) require(error >= 0 && error < 1e-9f, "groups are %g off themselves", double(error));
    for (const float square : squares) require(square > 0, "a channel has no queries");
}

// Of a cache that is used up by it.
void check_replacing(const KernelSet& kernels) {
    Cache cache;
    cache.rule.opens = 0.0f;
    DeltaAttend whole, parts;
    set_units(whole, cache);
    run(whole, cache, kernels, 0, kNumCells, 1);
    const std::vector<float> expected = cache.out;

    cache.rule.replaces = 1;
    set_units(parts, cache);
    std::fill(cache.out.begin(), cache.out.end(), 0.0f);
    for (int at = 0; at < kNumCells;) {
        const int end = std::min(at + (pick(0, 1) == 0 ? 1 : pick(1, 100)), kNumCells);
        run(parts, cache, kernels, at, end, pick(1, 3));
        const int least = parts.least_cells();
        at = pick(0, 4) == 0 ? pick(std::min(std::max(at, least), end), end) : end;
    }
    run(parts, cache, kernels, kNumCells - 1, kNumCells, 1);
    require(std::memcmp(expected.data(), cache.out.data(), sizeof(float) * expected.size()) == 0,
            "passes over what was given back differ, window %d", cache.rule.window);
    const int least = parts.least_cells();
    require(least > cache.rule.window && least < kNumCells && !parts.has_lost(), "%d cells are the least", least);
    parts.cut(least - 1);
    run(parts, cache, kernels, least - 1, least, 1);
    require(parts.has_lost(), "a cut below %d cells went unnoticed", least);
    parts.cut(0);
    require(parts.least_cells() == 0 && !parts.has_lost(), "an empty cache lacks something");
}

}  // namespace

int main() {
    for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
        const KernelSet* kernels = find_kernels(name);
        for (int i = 0; kernels != nullptr && i < 3; ++i) check(*kernels), check_replacing(*kernels);
    }
    std::printf("agree\n");
}

// Clustered keys in batches of any size, with truncation in between: bitwise the result of one batch over the same
// cache, with any number of threads and any thread group. Measuring errors changes nothing.

#include "sparse/delta/delta_rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "random_problem.h"
#include "random_threads.h"

namespace {

constexpr int kNumSlots = 448;

struct Cache {
    Case c;
    std::vector<uint16_t> mask;
    std::vector<float> q, out;
    std::vector<uint8_t> num_clusters;
    std::vector<float> score_bias, scales;
    DeltaRowsRule rule{pick(1, 200), pick(0, 7), pick(0, 1) * 0.02f};

    Cache() {
        do c = random_case(false);
        while (c.p.num_keys < kNumSlots);
        c.p.num_keys = kNumSlots, c.p.use_bf16 = 0;
        q.resize(size_t(kNumSlots) * c.p.num_heads * c.p.key_dim), out.resize(size_t(kNumSlots) * c.p.num_heads * c.p.value_dim);
        for (float& value : q) value = fp16_to_float(random_fp16());
        for (int head = 0; head < c.p.num_kv_heads; ++head) num_clusters.push_back(uint8_t(pick(8, 64)));
        num_clusters[0] = uint8_t(pick(8, 63));
        for (int head = 0; head < c.p.num_kv_heads; ++head) score_bias.push_back(1e-5f * float(pick(0, 1000)));
        for (int i = 0; i < c.p.num_kv_heads * c.p.key_dim; ++i) scales.push_back(float(pick(1, 255)));
    }
    AttentionProblem tokens(int begin, int end) {
        AttentionProblem p = c.p;
        mask.assign(size_t(end - begin) * kNumSlots, kMaskedKey);
        for (int token = begin; token < end; ++token) std::fill_n(mask.begin() + size_t(token - begin) * kNumSlots, token + 1, uint16_t(0));
        p.num_tokens = end - begin;
        p.mask = reinterpret_cast<const char*>(mask.data()), p.mask_token_stride = sizeof(uint16_t) * kNumSlots;
        p.q = reinterpret_cast<const char*>(q.data()) + begin * p.q_token_stride;
        p.out = reinterpret_cast<char*>(out.data()) + begin * p.out_token_stride;
        return p;
    }
};

void set_head_params(DeltaRowsPolicy& policy, const Cache& cache) {
    policy.set_head_params(cache.rule, cache.num_clusters.data(), cache.score_bias.data(), cache.scales.data(), 1, cache.c.p.num_kv_heads,
                           cache.c.p.key_dim);
    policy.start_pass({true, true, true});
}

void run(DeltaRowsPolicy& policy, Cache& cache, const AttentionKernels& kernels, int begin, int end, int num_threads, bool runs = true) {
    const AttentionProblem p = cache.tokens(begin, end);
    require(policy.reserve(p, 0, 0, num_threads), "there is no memory");
    const auto check_ran = [=](int num_read) {
        require((num_read != DeltaRowsPolicy::kSkipped) == runs, "the policy ran, or was skipped, unexpectedly");
    };
    const auto run_on = [&](ThreadGroup& threads) { check_ran(policy.run(p, 0, 0, kernels, threads)); };
    RandomThreadGroup threads(num_threads);
    if (pick(0, 1))
        run_on(threads);
    else
        on_thread_group(num_threads, run_on);
}

void check(const AttentionKernels& kernels) {
    Cache cache;
    FlashAttention flash;
    DeltaRowsPolicy whole(flash);
    set_head_params(whole, cache);
    run(whole, cache, kernels, 0, kNumSlots, 1);
    const std::vector<float> expected = cache.out;

    DeltaRowsPolicy chunked(flash);
    set_head_params(chunked, cache);
    std::fill(cache.out.begin(), cache.out.end(), 0.0f);
    for (int at = 0; at < kNumSlots;) {
        const int end = std::min(at + (pick(0, 1) == 0 ? 1 : pick(1, 150)), kNumSlots);
        run(chunked, cache, kernels, at, end, pick(1, 3));
        at = pick(0, 4) == 0 ? pick(0, end) : end;
    }
    require(std::memcmp(expected.data(), cache.out.data(), sizeof(float) * expected.size()) == 0, "passes differ from one pass, window %d",
            cache.rule.window);

    if (cache.rule.refine > 0.0f) return;  // nothing is refined while errors are measured
    chunked.start_error_stats();
    run(chunked, cache, kernels, 100, kNumSlots, 2, false);
    chunked.measure(cache.tokens(100, kNumSlots), 0);
    std::vector<float> errors(cache.num_clusters.size()), squares(cache.scales.size());
    chunked.read_error_stats(errors.data(), squares.data());
    require(std::memcmp(expected.data(), cache.out.data(), sizeof(float) * expected.size()) == 0, "a measured pass has written its result");
    for (const float error : errors) require(error >= 0 && error < 1e-9f, "clusters differ from themselves by %g", double(error));
    for (const float square : squares) require(square > 0, "a channel has no queries");
}

}  // namespace

int main() {
    for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
        const AttentionKernels* kernels = find_attention_kernels(name);
        for (int i = 0; kernels != nullptr && i < 3; ++i) check(*kernels);
    }
    std::printf("agree\n");
}

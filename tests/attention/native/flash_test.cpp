// Random problems against plain arithmetic in double, and bitwise against other numbers of threads: all keys, some
// slots, sinks, and a selection layer followed by one that reuses its selection.

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "attention/flash.h"
#include "checks.h"
#include "cpu.h"
#include "simd.h"
#include "random_problem.h"
#include "random_threads.h"
#include "sparse/tidal.h"

namespace {

double expected(const Case& c, int token, int head, int channel) {
    const AttentionProblem& p = c.p;
    const int kv_head = head / p.group_size();
    double sum = 0, total = 0;
    for (int i = 0; i < p.num_keys; ++i) {
        const int key = p.selected_slots == nullptr ? i : p.selected_slots[i];
        if (c.mask_of(token, key) == kMaskedKey) continue;
        const double weight = std::exp(c.score(token, head, key) - 40);
        total += weight;
        sum += weight * fp16_to_float(c.v[(size_t(key) * p.num_kv_heads + kv_head) * p.value_dim + channel]);
    }
    if (p.sinks != nullptr) total += std::exp(double(p.sinks[head]) - 40);
    return total == 0 ? 0 : sum / total;
}

std::vector<float> run(const Case& c, const AttentionKernels& kernels, int num_threads) {
    FlashAttention flash;
    if (!flash.reserve(c.p, num_threads)) return {};
    on_thread_group(num_threads, [&](ThreadGroup& threads) { flash.run(c.p, kernels, threads); });
    return {c.out.get(), c.out.get() + size_t(c.p.num_tokens) * c.p.num_heads * c.p.value_dim};
}

// One layer selects and the next one reuses its selection, for two passes. Returns the results of both layers.
std::vector<float> run_tidal(const Case& c, const AttentionKernels& kernels, int num_threads) {
    const uint8_t roles[] = {1, 2};
    const SelectionRule rule{c.p.num_keys / 3 + 12, 0.0f, 2, 8, 0};
    CurrentPolicy policy;
    require(lowtide_policy_set_roles(&policy, roles, 2, &rule) == 0, "there is no memory");
    std::vector<float> results;
    const size_t num_out = size_t(c.p.num_tokens) * c.p.num_heads * c.p.value_dim;
    for (int pass = 0; pass < 2; ++pass) {
        policy.start_pass({true, pass == 0, false});
        for (int layer = 0; layer < 2; ++layer) {
            if (!policy.reserve(c.p, layer, 0, num_threads)) return {};
            on_thread_group(num_threads, [&](ThreadGroup& threads) { policy.run(c.p, layer, 0, kernels, threads); });
            results.insert(results.end(), c.out.get(), c.out.get() + num_out);
        }
    }
    return results;
}

}  // namespace

int main() {
    int num_checked = 0;
    for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
        const AttentionKernels* kernels = find_attention_kernels(name);
        if (kernels == nullptr) continue;
        for (int i = 0; i < 40; ++i) {
            const Case c = random_case(true);
            const std::vector<float> alone = run(c, *kernels, 1);
            for (int threads : {2, 3})
                require(std::memcmp(alone.data(), run(c, *kernels, threads).data(), alone.size() * 4) == 0,
                        "%s: %d threads change the result", name, threads);
            const int token = pick(0, c.p.num_tokens - 1), head = pick(0, c.p.num_heads - 1), d = pick(0, c.p.value_dim - 1);
            const double want = expected(c, token, head, d);
            const double got = alone[(size_t(token) * c.p.num_heads + head) * c.p.value_dim + d];
            const double allowed = c.p.use_bf16 && c.p.num_tokens > 32 ? 0.05 : 1e-4;
            require(std::fabs(got - want) <= allowed * (1 + std::fabs(want)), "%s: expected %g, found %g", name, want, got);
            ++num_checked;
            if (c.p.selected_slots != nullptr) continue;
            const std::vector<float> tidal = run_tidal(c, *kernels, 1), again = run_tidal(c, *kernels, 3);
            require(tidal.size() == 4 * alone.size() && std::memcmp(tidal.data(), alone.data(), alone.size() * 4) == 0,
                    "%s: a selection layer is not dense", name);
            require(std::memcmp(tidal.data(), again.data(), tidal.size() * 4) == 0, "%s: the number of threads changes the selection",
                    name);
        }
    }
    for (size_t capacity = 0; capacity < 64; ++capacity) {
        std::unique_ptr<char[]> out(new char[capacity == 0 ? 1 : capacity]);
        lowtide_cpu_features(out.get(), capacity);
    }
    std::printf("%d problems agree\n", num_checked);
    return num_checked == 0;
}

// Random problems against plain double arithmetic, and bit for bit against other numbers of threads: every key,
// some cells, sinks, and a selection layer with one that reuses its set.

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "attend.h"
#include "checks.h"
#include "cpu_features.h"
#include "half.h"
#include "random_problem.h"
#include "tidal_attend.h"

namespace {

double expected(const Case& c, int row, int head, int channel) {
    const AttentionProblem& p = c.p;
    const int kv_head = head / p.group_size();
    double sum = 0, total = 0;
    for (int i = 0; i < p.num_keys; ++i) {
        const int key = p.cell_of(i);
        if (c.mask_of(row, key) == kHiddenKey) continue;
        const double weight = std::exp(c.score(row, head, key) - 40);
        total += weight;
        sum += weight * half_to_float(c.v[(size_t(key) * p.num_kv_heads + kv_head) * p.value_size + channel]);
    }
    if (p.sinks != nullptr) total += std::exp(double(p.sinks[head]) - 40);
    return total == 0 ? 0 : sum / total;
}

std::vector<float> run(const Case& c, const KernelSet& kernels, int num_threads) {
    Attend attend;
    if (!attend.reserve(c.p, num_threads)) return {};
    on_threads(num_threads, [&](int thread) { attend.run(c.p, kernels, thread, num_threads); });
    return {c.out.get(), c.out.get() + size_t(c.p.num_rows) * c.p.num_heads * c.p.value_size};
}

// One layer selects and the next reuses its set, for two passes; returns both layers' results.
std::vector<float> run_tidal(const Case& c, const KernelSet& kernels, int num_threads) {
    const uint8_t roles[] = {1, 2};
    TidalAttend attend;
    attend.set_roles(roles, 2, SelectionRule{c.p.num_keys / 3 + 12, 0.0f, 2, 8, 0});
    std::vector<float> results;
    const size_t num_out = size_t(c.p.num_rows) * c.p.num_heads * c.p.value_size;
    for (int pass = 0; pass < 2; ++pass) {
        attend.start_pass(true, pass == 0);
        for (int layer = 0; layer < 2; ++layer) {
            if (!attend.reserve(c.p, layer, num_threads)) return {};
            on_threads(num_threads, [&](int thread) { attend.run(c.p, layer, kernels, thread, num_threads); });
            results.insert(results.end(), c.out.get(), c.out.get() + num_out);
        }
    }
    return results;
}

}  // namespace

int main() {
    int num_checked = 0;
    for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
        const KernelSet* kernels = find_kernels(name);
        if (kernels == nullptr) continue;
        for (int i = 0; i < 40; ++i) {
            const Case c = some_case(true);
            const std::vector<float> alone = run(c, *kernels, 1);
            for (int threads : {2, 3})
                require(std::memcmp(alone.data(), run(c, *kernels, threads).data(), alone.size() * 4) == 0,
                        "%s: %d threads change the result", name, threads);
            const int row = pick(0, c.p.num_rows - 1), head = pick(0, c.p.num_heads - 1), d = pick(0, c.p.value_size - 1);
            const double want = expected(c, row, head, d);
            const double got = alone[(size_t(row) * c.p.num_heads + head) * c.p.value_size + d];
            const double allowed = c.p.rounded && c.p.num_rows > 32 ? 0.05 : 1e-4;
            require(std::fabs(got - want) <= allowed * (1 + std::fabs(want)), "%s: %g wanted, %g found", name, want, got);
            ++num_checked;
            if (c.p.selected != nullptr) continue;
            const std::vector<float> tidal = run_tidal(c, *kernels, 1), again = run_tidal(c, *kernels, 3);
            require(tidal.size() == 4 * alone.size() && std::memcmp(tidal.data(), alone.data(), alone.size() * 4) == 0,
                    "%s: a selection layer is not dense", name);
            require(std::memcmp(tidal.data(), again.data(), tidal.size() * 4) == 0, "%s: threads change what is selected", name);
        }
    }
    for (size_t capacity = 0; capacity < 64; ++capacity) {
        std::unique_ptr<char[]> out(new char[capacity == 0 ? 1 : capacity]);
        lowtide_cpu_features(out.get(), capacity);
    }
    std::printf("%d problems agree\n", num_checked);
    return num_checked == 0;
}

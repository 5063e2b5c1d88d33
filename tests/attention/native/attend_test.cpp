// Random problems in buffers of exactly their size, so that a sanitizer sees any step beyond; results
// against plain double arithmetic, and bit for bit against other numbers of threads: every key, some cells,
// sinks, and a selection layer with one that reuses its set.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attend.h"
#include "cpu_features.h"
#include "half.h"
#include "tidal_attend.h"

namespace {

std::mt19937 random_bits(7);

int pick(int least, int most) { return std::uniform_int_distribution<int>(least, most)(random_bits); }

// A finite half of moderate size.
uint16_t some_half() { return uint16_t(pick(0, 1) << 15 | pick(0x2c00, 0x4000)); }

struct Case {
    AttentionProblem p{};
    std::unique_ptr<float[]> q, out;
    std::unique_ptr<uint16_t[]> k, v, mask;
    std::vector<int32_t> cells;
    std::unique_ptr<float[]> sinks;
};

Case some_case() {
    Case c;
    AttentionProblem& p = c.p;
    p.num_kv_heads = pick(1, 3), p.num_heads = p.num_kv_heads * pick(1, 4);
    p.num_rows = pick(0, 3) == 0 ? pick(33, 40) : pick(1, 20), p.rounded = pick(0, 1), p.num_keys = pick(1, 1100);
    p.key_size = 16 * pick(1, 8), p.value_size = 16 * pick(1, 8);
    p.scale = 0.1f, p.softcap = pick(0, 3) == 0 ? 5.0f : 0.0f;
    const size_t num_q = size_t(p.num_rows) * p.num_heads * p.key_size;
    const size_t num_k = size_t(p.num_keys) * p.num_kv_heads * p.key_size;
    const size_t num_v = size_t(p.num_keys) * p.num_kv_heads * p.value_size;
    const size_t num_mask = size_t(p.num_rows) * p.num_keys;
    c.q.reset(new float[num_q]), c.k.reset(new uint16_t[num_k]), c.v.reset(new uint16_t[num_v]);
    c.mask.reset(new uint16_t[num_mask]), c.out.reset(new float[size_t(p.num_rows) * p.num_heads * p.value_size]);
    for (size_t i = 0; i < num_q; ++i) c.q[i] = half_to_float(some_half());
    for (size_t i = 0; i < num_k; ++i) c.k[i] = some_half();
    for (size_t i = 0; i < num_v; ++i) c.v[i] = some_half();
    for (size_t i = 0; i < num_mask; ++i) c.mask[i] = pick(0, 3) == 0 ? 0xfc00 : 0;
    p.q = reinterpret_cast<char*>(c.q.get()), p.q_head_stride = 4 * p.key_size, p.q_row_stride = p.q_head_stride * p.num_heads;
    p.k = reinterpret_cast<char*>(c.k.get()), p.k_head_stride = 2 * p.key_size, p.k_key_stride = p.k_head_stride * p.num_kv_heads;
    p.v = reinterpret_cast<char*>(c.v.get()), p.v_head_stride = 2 * p.value_size, p.v_key_stride = p.v_head_stride * p.num_kv_heads;
    p.mask = reinterpret_cast<char*>(c.mask.get()), p.mask_row_stride = 2 * p.num_keys;
    if (pick(0, 1) == 0) {
        for (int cell = 0; cell < p.num_keys; ++cell)
            if (pick(0, 2) == 0) c.cells.push_back(cell);
        if (!c.cells.empty()) p.selected = c.cells.data(), p.num_keys = int(c.cells.size());
    }
    if (pick(0, 2) == 0) {
        c.sinks.reset(new float[p.num_heads]);
        for (int i = 0; i < p.num_heads; ++i) c.sinks[i] = half_to_float(some_half());
        p.sinks = c.sinks.get();
    }
    p.out = reinterpret_cast<char*>(c.out.get()), p.out_head_stride = 4 * p.value_size, p.out_row_stride = p.out_head_stride * p.num_heads;
    return c;
}

double expected(const Case& c, int row, int head, int channel) {
    const AttentionProblem& p = c.p;
    const int kv_head = head / p.group_size();
    double sum = 0, total = 0;
    for (int i = 0; i < p.num_keys; ++i) {
        const int key = p.cell_of(i);
        if (c.mask[row * p.mask_row_stride / 2 + key] == 0xfc00) continue;
        double score = 0;
        for (int d = 0; d < p.key_size; ++d)
            score += double(c.q[(size_t(row) * p.num_heads + head) * p.key_size + d]) *
                     half_to_float(c.k[(size_t(key) * p.num_kv_heads + kv_head) * p.key_size + d]);
        score *= p.scale;
        if (p.softcap != 0) score = p.softcap * std::tanh(score / p.softcap);
        const double weight = std::exp(score - 40);
        total += weight;
        sum += weight * half_to_float(c.v[(size_t(key) * p.num_kv_heads + kv_head) * p.value_size + channel]);
    }
    if (p.sinks != nullptr) total += std::exp(double(p.sinks[head]) - 40);
    return total == 0 ? 0 : sum / total;
}

std::vector<float> run(const Case& c, const KernelSet& kernels, int num_threads) {
    Attend attend;
    if (!attend.reserve(c.p, num_threads)) return {};
    std::vector<std::thread> threads;
    for (int i = 1; i < num_threads; ++i) threads.emplace_back([&, i] { attend.run(c.p, kernels, i, num_threads); });
    attend.run(c.p, kernels, 0, num_threads);
    for (std::thread& thread : threads) thread.join();
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
            std::vector<std::thread> threads;
            for (int i = 1; i < num_threads; ++i)
                threads.emplace_back([&, i] { attend.run(c.p, layer, kernels, i, num_threads); });
            attend.run(c.p, layer, kernels, 0, num_threads);
            for (std::thread& thread : threads) thread.join();
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
            const Case c = some_case();
            const std::vector<float> alone = run(c, *kernels, 1);
            for (int threads : {2, 3})
                if (std::memcmp(alone.data(), run(c, *kernels, threads).data(), alone.size() * 4) != 0)
                    return std::printf("%s: %d threads change the result\n", name, threads), 1;
            const int row = pick(0, c.p.num_rows - 1), head = pick(0, c.p.num_heads - 1), d = pick(0, c.p.value_size - 1);
            const double want = expected(c, row, head, d);
            const double got = alone[(size_t(row) * c.p.num_heads + head) * c.p.value_size + d];
            const double allowed = c.p.rounded && c.p.num_rows > 32 ? 0.05 : 1e-4;
            if (std::fabs(got - want) > allowed * (1 + std::fabs(want)))
                return std::printf("%s: %g wanted, %g found\n", name, want, got), 1;
            ++num_checked;
            if (c.p.selected != nullptr) continue;
            const std::vector<float> tidal = run_tidal(c, *kernels, 1), again = run_tidal(c, *kernels, 3);
            if (tidal.size() != 4 * alone.size() || std::memcmp(tidal.data(), alone.data(), alone.size() * 4) != 0)
                return std::printf("%s: a selection layer is not dense\n", name), 1;
            if (std::memcmp(tidal.data(), again.data(), tidal.size() * 4) != 0)
                return std::printf("%s: threads change what is selected\n", name), 1;
        }
    }
    for (size_t capacity = 0; capacity < 64; ++capacity) {
        std::unique_ptr<char[]> out(new char[capacity == 0 ? 1 : capacity]);
        lowtide_cpu_features(out.get(), capacity);
    }
    std::printf("%d problems agree\n", num_checked);
    return num_checked == 0;
}

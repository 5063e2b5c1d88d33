// Random problems in buffers of exactly their size, so that a sanitizer sees any step beyond; results
// against plain double arithmetic, and bit for bit against other numbers of threads.

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

const KernelSet* find_kernels(const char* name);

namespace {

std::mt19937 random_bits(7);

int pick(int least, int most) { return std::uniform_int_distribution<int>(least, most)(random_bits); }

// A finite half of moderate size.
uint16_t some_half() { return uint16_t(pick(0, 1) << 15 | pick(0x2c00, 0x4000)); }

struct Case {
    AttentionProblem p{};
    std::unique_ptr<float[]> q, out;
    std::unique_ptr<uint16_t[]> k, v, mask;
};

Case some_case() {
    Case c;
    AttentionProblem& p = c.p;
    p.num_kv_heads = pick(1, 3), p.num_heads = p.num_kv_heads * pick(1, 4);
    p.num_rows = pick(1, 20), p.num_keys = pick(1, 1100);
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
    p.out = reinterpret_cast<char*>(c.out.get()), p.out_head_stride = 4 * p.value_size, p.out_row_stride = p.out_head_stride * p.num_heads;
    return c;
}

double expected(const Case& c, int row, int head, int channel) {
    const AttentionProblem& p = c.p;
    const int kv_head = head / p.group_size();
    double sum = 0, total = 0;
    for (int key = 0; key < p.num_keys; ++key) {
        if (c.mask[size_t(row) * p.num_keys + key] == 0xfc00) continue;
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
            if (std::fabs(got - want) > 1e-4 + 1e-4 * std::fabs(want))
                return std::printf("%s: %g wanted, %g found\n", name, want, got), 1;
            ++num_checked;
        }
    }
    for (size_t capacity = 0; capacity < 64; ++capacity) {
        std::unique_ptr<char[]> out(new char[capacity == 0 ? 1 : capacity]);
        lowtide_cpu_features(out.get(), capacity);
    }
    std::printf("%d problems agree\n", num_checked);
    return num_checked == 0;
}

// Sequences whose keys are mixed in one cache: each sequence's result is bitwise that of its keys alone in a cache,
// with any number of threads. A mask that contradicts the layout is not taken for one that agrees.

#include "llama/batch.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention/flash.h"
#include "checks.h"
#include "random_problem.h"
#include "random_threads.h"

namespace {

struct Sequences {
    int num_shared = 0;
    std::vector<int32_t> num_tokens, num_slots;
    std::vector<std::vector<int32_t>> slots;

    void apply_to(BatchLayout& batch) const {
        std::vector<const int32_t*> pointers;
        for (const auto& own : slots) pointers.push_back(own.data());
        batch.set(num_shared, int(num_tokens.size()), num_tokens.data(), pointers.data(), num_slots.data());
    }
};

// Deals out the tokens, and the slots behind the shared ones. Each token sees its sequence's slots except those of
// the tokens behind it.
Sequences deal(Case& c) {
    Sequences s;
    const AttentionProblem& p = c.p;
    s.num_shared = pick(0, p.num_keys / 2);
    for (int left = p.num_tokens; left > 0; left -= s.num_tokens.back()) s.num_tokens.push_back(pick(1, left));
    s.slots.resize(s.num_tokens.size());
    for (int slot = s.num_shared; slot < p.num_keys; ++slot)
        if (pick(0, 8) != 0) s.slots[pick(0, int(s.slots.size()) - 1)].push_back(slot);
    for (int i = 0; i < p.num_tokens * p.num_keys; ++i) c.mask[i] = kMaskedKey;
    for (size_t i = 0, token = 0; i < s.slots.size(); ++i) {
        s.num_slots.push_back(int(s.slots[i].size()));
        for (int r = 0; r < s.num_tokens[i]; ++r, ++token) {
            uint16_t* mask = c.mask.get() + token * p.num_keys;
            const int hidden = s.num_tokens[i] - 1 - r, own = s.num_slots[i];
            for (int j = 0; j < s.num_shared; ++j) mask[j] = 0;
            for (int j = 0; j < own - hidden; ++j) mask[s.slots[i][j]] = 0;
        }
    }
    return s;
}

bool sees_something(const Case& c) {
    for (int token = 0; token < c.p.num_tokens; ++token) {
        int seen = 0;
        for (int j = 0; j < c.p.num_keys; ++j) seen += c.mask_of(token, j) != kMaskedKey;
        if (seen == 0) return false;
    }
    return true;
}

// The keys, values and masks of a sequence side by side, padded with masked ones as llama.cpp pads them.
struct Alone {
    std::vector<uint16_t> k, v, mask;
    std::vector<float> out;
    AttentionProblem p;

    Alone(const AttentionProblem& whole, const AttentionProblem& slice) : p(slice) {
        const int keys = (slice.num_keys + 255) / 256 * 256, kv_heads = p.num_kv_heads;
        k.resize(size_t(keys) * kv_heads * p.key_dim), v.resize(size_t(keys) * kv_heads * p.value_dim);
        mask.assign(size_t(keys) * p.num_tokens, kMaskedKey);
        out.resize(size_t(p.num_tokens) * p.num_heads * p.value_dim);
        for (int j = 0; j < slice.num_keys; ++j) {
            const int slot = slice.selected_slots[j];
            std::memcpy(&k[size_t(j) * kv_heads * p.key_dim], whole.k + slot * whole.k_key_stride, whole.k_key_stride);
            std::memcpy(&v[size_t(j) * kv_heads * p.value_dim], whole.v + slot * whole.v_key_stride, whole.v_key_stride);
            for (int token = 0; token < p.num_tokens; ++token)
                mask[size_t(token) * keys + j] = reinterpret_cast<const uint16_t*>(slice.mask + token * slice.mask_token_stride)[slot];
        }
        p.k = reinterpret_cast<char*>(k.data()), p.v = reinterpret_cast<char*>(v.data());
        p.mask = reinterpret_cast<char*>(mask.data()), p.mask_token_stride = 2 * keys;
        p.out = reinterpret_cast<char*>(out.data()), p.selected_slots = nullptr, p.num_keys = keys;
    }
};

void run(FlashAttention& flash, const AttentionProblem& p, const AttentionKernels& kernels, int num_threads) {
    require(flash.reserve(p, num_threads), "there is no memory");
    on_thread_group(num_threads, [&](ThreadGroup& threads) { flash.run(p, kernels, threads); });
}

// All sequences at once give what they gave one after another, which is still in `out`.
void check_many(Case& c, BatchLayout& batch, const AttentionKernels& kernels, int num_threads) {
    if (!sees_something(c)) return;
    const size_t num_out = size_t(c.p.num_tokens) * c.p.num_heads * c.p.value_dim;
    const std::vector<float> before(c.out.get(), c.out.get() + num_out);
    std::fill_n(c.out.get(), num_out, 7.0f);
    FlashAttention flash;
    require(flash.reserve_many(c.p, batch.shared(), num_threads), "there is no memory");
    on_thread_group(num_threads, [&](ThreadGroup& threads) {
        if (batch.matches_mask(c.p, 0, threads)) flash.run_many(batch.problems(), batch.num_sequences(), batch.shared(), kernels, threads);
    });
    require(std::memcmp(before.data(), c.out.get(), sizeof(float) * num_out) == 0, "%s: %d sequences at once give another result",
            kernels.name, batch.num_sequences());
}

void check(Case& c, const AttentionKernels& kernels) {
    c.p.use_bf16 = 0;
    const Sequences s = deal(c);
    BatchLayout batch;
    require(!batch.is_active(), "a layout is active before it is set");
    s.apply_to(batch);
    const int num_threads = pick(1, 3);
    on_thread_group(num_threads, [&](ThreadGroup& threads) {
        const bool agrees = batch.matches_mask(c.p, 0, threads);
        require(agrees == sees_something(c), "a thread finds that the layout %sagrees", agrees ? "" : "dis");
    });
    FlashAttention flash, alone;
    for (int i = 0; i < batch.num_sequences(); ++i) {
        const AttentionProblem slice = batch.problem(c.p, i);
        if (slice.num_keys == 0) continue;
        Alone expected(c.p, slice);
        run(flash, slice, kernels, num_threads);
        run(alone, expected.p, kernels, 1);
        const size_t row_bytes = sizeof(float) * slice.num_heads * slice.value_dim;
        require(std::memcmp(slice.out, expected.out.data(), row_bytes * slice.num_tokens) == 0,
                "%s: sequence %d of %d differs from the same alone", kernels.name, i, batch.num_sequences());
    }
    check_many(c, batch, kernels, num_threads);
    batch.set(0, 0, nullptr, nullptr, nullptr);
    require(!batch.is_active(), "a layout without sequences is active");
}

// A token that sees another sequence's key, slots beyond the cache, and tokens that belong to no sequence.
void check_refusals() {
    Case c = random_case(false);
    while (c.p.num_keys < 8 || c.p.num_tokens < 2) c = random_case(false);
    for (int i = 0; i < c.p.num_tokens * c.p.num_keys; ++i) c.mask[i] = i % c.p.num_keys < 4 ? 0 : kMaskedKey;
    const auto agrees = [&](const Sequences& s) {
        BatchLayout batch;
        s.apply_to(batch);
        RandomThreadGroup threads(1);
        const bool found = batch.matches_mask(c.p, 0, threads);
        require(batch.matches_mask(c.p, 1, threads) == found, "the next layer finds otherwise");
        require(batch.num_refused() == !found, "%d masks are refused", int(batch.num_refused()));
        return found;
    };
    const int tokens = c.p.num_tokens;
    require(agrees({4, {1, tokens - 1}, {0, 0}, {{}, {}}}), "a correct layout is refused");
    require(agrees({2, {1, tokens - 1}, {2, 3}, {{2, 3}, {2, 3, 5}}}), "a sequence with a masked slot of its own is refused");
    require(!agrees({3, {1, tokens - 1}, {1, 0}, {{3}, {}}}), "a slot of another sequence is accepted");
    require(!agrees({4, {1, tokens - 1}, {1, 0}, {{c.p.num_keys}, {}}}), "a slot beyond the cache is accepted");
    require(!agrees({4, {1, tokens}, {0, 0}, {{}, {}}}), "tokens beyond the batch are accepted");
    require(!agrees({4, {tokens - 1}, {0}, {{}}}), "a token of no sequence is accepted");
}

}  // namespace

int main() {
    int num_checked = 0;
    check_refusals();
    for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
        const AttentionKernels* kernels = find_attention_kernels(name);
        if (kernels == nullptr) continue;
        for (int i = 0; i < 12; ++i, ++num_checked) {
            Case c = random_case(false);
            check(c, *kernels);
        }
    }
    std::printf("%d passes agree\n", num_checked);
    return num_checked == 0;
}

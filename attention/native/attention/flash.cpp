// Splits exact attention between threads. Few tokens: one work item per KV head and chunk of keys (split-K). Many
// tokens: one item per KV head and tile of tokens. Both merge the same chunks in the same order, so a token's result
// is bitwise the same alone, in any batch and with any number of threads.

#include "attention/flash.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "attention/partials.h"
#include "attention/problem.h"
#include "cpu.h"

namespace {

// The kernels ask for keys kPrefetchDistance ahead. These are the ones before: waiting for each of them would take as
// long as all the rest.
void prefetch_first_keys(const AttentionProblem& p, int first_head, int end_head, int begin) {
    if (p.selected_slots != nullptr) return;
    const int end = std::min(begin + kPrefetchDistance, p.num_keys);
    const auto prefetch_rows = [&](const char* rows, size_t key_stride, size_t head_stride, KvType type, int size) {
        const size_t num_bytes = stored_bytes(type, size);
        for (int key = begin; key < end; ++key)
            for (int head = first_head; head < end_head; ++head)
                for (size_t at = 0; at < num_bytes; at += 64) __builtin_prefetch(rows + key * key_stride + head * head_stride + at, 0, 2);
    };
    prefetch_rows(p.k, p.k_key_stride, p.k_head_stride, p.k_type, p.key_dim);
    prefetch_rows(p.v, p.v_key_stride, p.v_head_stride, p.v_type, p.value_dim);
}

// The number of tokens in a tile. Tiles are smaller if some threads would have no work otherwise.
int tile_tokens(const AttentionProblem& p, int num_workers) {
    int tokens = kTileTokens;
    while (tokens > kFewTokens && p.num_kv_heads * ((p.num_tokens + tokens - 1) / tokens) < 2 * num_workers) tokens /= 2;
    return tokens;
}

}  // namespace

bool FlashAttention::reserve(const AttentionProblem& p, int num_threads) {
    const size_t group_floats = size_t(p.group_size()) * partial_floats(p);
    const size_t split = size_t(p.num_tokens) * p.num_kv_heads * num_chunks_of(p) * group_floats;
    const size_t tiled = 2 * size_t(kTileTokens) * group_floats * num_threads;
    const size_t needed = p.num_tokens <= kFewTokens ? split : tiled;
    try {
        if (partials_.size() < needed) partials_.resize(needed);
        if (scratch_.size() < kScratchFloats * num_threads) scratch_.resize(kScratchFloats * num_threads);
    } catch (const std::bad_alloc&) {
        return false;
    }
    reserved_threads_ = std::max(reserved_threads_, num_threads);
    return true;
}

void FlashAttention::run(const AttentionProblem& p, const AttentionKernels& kernels, ThreadGroup& threads) {
    const int num_workers = this->num_workers(threads.num_threads);
    const auto begin_anew = [this] { next_item_ = 0; };  // the next node uses the partials again
    const auto by_workers = [&](auto work) {
        threads.parallel_for([&](int thread) {
            if (thread < num_workers) work(thread);
        }, begin_anew);
    };
    if (p.num_tokens > kFewTokens) {
        by_workers([&](int thread) { attend_tiled(p, kernels, thread, num_workers); });
        return;
    }
    // Another step of all threads takes longer than a short merge.
    constexpr int kMaxMergedAlone = 256;
    const bool merges_alone = p.num_tokens * p.num_heads * num_chunks_of(p) <= kMaxMergedAlone;
    threads.parallel_for(
        [&](int thread) {
            if (thread < num_workers) attend_split(p, kernels, thread, num_workers);
        },
        [&] {
            begin_anew();
            if (merges_alone) merge_split(p, 0, 1);
        });
    if (!merges_alone) by_workers([&](int thread) { merge_split(p, thread, num_workers); });
}

void FlashAttention::start_partials(const AttentionProblem& p, int count, float* partials) {
    for (int i = 0; i < count; ++i) start_partial(partials + i * partial_floats(p), p.value_dim);
}

void FlashAttention::add_keys(const AttentionProblem& p, const AttentionKernels& kernels, int thread, float* partials) {
    float* scratch = scratch_.data() + kScratchFloats * thread;
    for (int begin = 0; begin < p.num_keys; begin += kChunkKeys)
        kernels.attend_keys(p, 0, 0, 1, begin, std::min(begin + kChunkKeys, p.num_keys), scratch, partials);
}

void FlashAttention::attend_split(const AttentionProblem& p, const AttentionKernels& kernels, int thread, int num_workers) {
    const int num_chunks = num_chunks_of(p), group = p.group_size(), floats = partial_floats(p);
    const size_t item_floats = size_t(p.num_tokens) * group * floats;
    float* scratch = scratch_.data() + kScratchFloats * thread;
    // The heads of one key are side by side in memory: a thread that takes all of them reads one stretch of it. With few
    // chunks that would leave a thread without work.
    const int heads_each = num_chunks >= 2 * num_workers ? p.num_kv_heads : 1;
    const int num_items = p.num_kv_heads * num_chunks / heads_each;
    const auto attend_item = [&](int item, int first_item) {
        const int chunk = item * heads_each / p.num_kv_heads, first = item * heads_each % p.num_kv_heads;
        float* partials = partials_.data() + item_floats * (chunk * p.num_kv_heads + first);
        for (int i = 0; i < heads_each * p.num_tokens * group; ++i) start_partial(partials + i * floats, p.value_dim);
        if (heads_each == 1 || item == first_item) prefetch_first_keys(p, first, first + heads_each, chunk * kChunkKeys);
        for (int begin = chunk * kChunkKeys; begin < chunk_end(p, chunk); begin += kBlockKeys)
            for (int i = 0; i < heads_each; ++i)
                kernels.attend_keys(p, first + i, 0, p.num_tokens, begin, std::min(begin + kBlockKeys, chunk_end(p, chunk)),
                                    scratch, partials + item_floats * i);
    };
    // Threads take runs of items, which get shorter towards the end. So a thread mostly prefetches keys that it reads
    // itself, and no thread is left with a long run.
    for (int begin = next_item_, end; begin < num_items;) {
        end = begin + std::max((num_items - begin) / (2 * num_workers), 1);
        if (!next_item_.compare_exchange_weak(begin, end)) continue;
        for (int item = begin; item < end; ++item) attend_item(item, begin);
        begin = next_item_;
    }
}

void FlashAttention::merge_split(const AttentionProblem& p, int thread, int num_workers) {
    const int num_chunks = num_chunks_of(p), group = p.group_size(), floats = partial_floats(p);
    const size_t item_floats = size_t(p.num_tokens) * group * floats;
    float merged[2 + kMaxHeadDim];
    for (int item = thread; item < p.num_tokens * p.num_heads; item += num_workers) {
        const int token = item / p.num_heads, head = item % p.num_heads, kv_head = head / group;
        start_partial(merged, p.value_dim);
        for (int chunk = 0; chunk < num_chunks; ++chunk)
            merge(merged,
                  partials_.data() + item_floats * (chunk * p.num_kv_heads + kv_head) + size_t(token * group + head % group) * floats,
                  p.value_dim);
        write_output(p, token, head, merged);
    }
}

void FlashAttention::attend_tiled(const AttentionProblem& p, const AttentionKernels& kernels, int thread, int num_workers) {
    const int tokens = tile_tokens(p, num_workers), num_tiles = (p.num_tokens + tokens - 1) / tokens;
    const size_t tile_floats = size_t(kTileTokens) * p.group_size() * partial_floats(p);
    float* scratch = scratch_.data() + kScratchFloats * thread;
    float* partials = partials_.data() + 2 * tile_floats * thread;
    for (int item = next_item_++; item < p.num_kv_heads * num_tiles; item = next_item_++) {
        const int begin = item % num_tiles * tokens;
        attend_tile(p, kernels, item / num_tiles, begin, std::min(begin + tokens, p.num_tokens), scratch, partials,
                    partials + tile_floats);
    }
}

void FlashAttention::attend_tile(const AttentionProblem& p, const AttentionKernels& kernels, int kv_head, int begin, int end,
                                 float* scratch, float* partials, float* merged) {
    const int group = p.group_size(), floats = partial_floats(p), count = (end - begin) * group;
    const bool use_bf16 = p.use_bf16 && kernels.attend_keys_bf16 != nullptr && p.num_tokens > kMaxDraftTokens;
    const AttendKeys attend_keys = use_bf16 ? kernels.attend_keys_bf16 : kernels.attend_keys;
    for (int i = 0; i < count; ++i) start_partial(merged + i * floats, p.value_dim);
    for (int chunk = 0; chunk < num_chunks_of(p); ++chunk) {
        for (int i = 0; i < count; ++i) start_partial(partials + i * floats, p.value_dim);
        attend_keys(p, kv_head, begin, end, chunk * kChunkKeys, chunk_end(p, chunk), scratch, partials);
        for (int i = 0; i < count; ++i) merge(merged + i * floats, partials + i * floats, p.value_dim);
    }
    for (int i = 0; i < count; ++i) write_output(p, begin + i / group, kv_head * group + i % group, merged + i * floats);
}

const AttentionKernels* find_attention_kernels(const char* name) {
    const bool avx512 = processor_has("avx512f") && processor_has("avx512bw") && processor_has("avx512vl");
    const AttentionKernels* const usable[] = {
        avx512 ? avx512_attention_kernels() : nullptr,
        processor_has("avx2") && processor_has("fma") && processor_has("f16c") ? avx2_attention_kernels() : nullptr,
        portable_attention_kernels(),
    };
    for (const AttentionKernels* kernels : usable)
        if (kernels != nullptr && (name == nullptr || std::strcmp(name, kernels->name) == 0)) return kernels;
    return nullptr;
}

extern "C" int lowtide_has_attention_kernels(const char* kernels) { return find_attention_kernels(kernels) != nullptr; }

// Exact attention of several problems, whose threads wait only once. First the chunks that problems share: their tokens
// are the rows of one matrix product with keys that are read and converted once. Then each problem merges the results
// of its shared chunks, and attends to the rest of its keys. The order of every sum is that of the problem alone.

#include <algorithm>
#include <new>

#include "attention/flash.h"
#include "attention/partials.h"

bool FlashAttention::reserve_many(const AttentionProblem& p, const SharedChunks& shared, int num_threads) {
    AttentionProblem tile = p;
    tile.num_tokens = kTileTokens;
    const size_t needed = shared.num_tokens * p.num_heads * partial_floats(p);
    try {
        if (shared_partials_.size() < needed) shared_partials_.resize(needed);
    } catch (const std::bad_alloc&) {
        return false;
    }
    return reserve(tile, num_threads);
}

void FlashAttention::run_many(const AttentionProblem* problems, int count, const SharedChunks& shared, const AttentionKernels& kernels,
                              ThreadGroup& threads) {
    const int num_workers = this->num_workers(threads.num_threads);
    const auto begin_anew = [this] { next_item_ = 0; };
    if (!shared.chunks.empty())
        threads.parallel_for([&](int thread) {
            if (thread < num_workers) attend_shared(problems, shared, kernels, thread, num_workers);
        }, begin_anew);
    threads.parallel_for([&](int thread) {
        if (thread < num_workers) attend_rest(problems, count, shared, kernels, thread, num_workers);
    }, begin_anew);
}

// One item per chunk, or per chunk and head where these are few. The partial results of a chunk have the heads of keys
// outermost, then the tokens, then the heads of queries.
void FlashAttention::attend_shared(const AttentionProblem* problems, const SharedChunks& shared, const AttentionKernels& kernels,
                                   int thread, int num_workers) {
    const int num_chunks = int(shared.chunks.size()), num_heads = problems->num_kv_heads;
    const int heads_each = num_chunks >= 4 * num_workers ? num_heads : 1;
    float* scratch = scratch_.data() + kScratchFloats * thread;
    for (int item = next_item_++; item < num_chunks * num_heads / heads_each; item = next_item_++) {
        const SharedChunk& chunk = shared.chunks[item * heads_each / num_heads];
        const int first_head = item * heads_each % num_heads, begin = chunk.chunk * kChunkKeys;
        AttentionProblem p = problems[chunk.first];
        p.num_tokens = chunk.num_tokens, p.following = nullptr;
        const size_t floats = size_t(chunk.num_tokens) * p.group_size() * partial_floats(p);
        float* partials = shared_partials_.data() + chunk.before * p.num_heads * partial_floats(p) + floats * first_head;
        start_partials(p, heads_each * chunk.num_tokens * p.group_size(), partials);
        for (int block = begin; block < begin + kChunkKeys; block += kBlockKeys)
            for (int i = 0; i < heads_each; ++i)
                kernels.attend_keys(p, first_head + i, 0, chunk.num_tokens, block, block + kBlockKeys, scratch, partials + floats * i);
    }
}

const float* FlashAttention::shared_partials(const AttentionProblem& p, const SharedChunk& chunk, int kv_head) const {
    return shared_partials_.data() + (chunk.before * p.num_heads + size_t(chunk.num_tokens) * p.group_size() * kv_head) * partial_floats(p);
}

// The threads take tiles of all problems from one queue. The heads of one key are side by side in memory: where there
// are problems enough, a thread takes all heads of a few tokens, and reads whole cache lines once.
void FlashAttention::attend_rest(const AttentionProblem* problems, int count, const SharedChunks& shared,
                                 const AttentionKernels& kernels, int thread, int num_workers) {
    const size_t tile_floats = size_t(kTileTokens) * problems->group_size() * partial_floats(*problems);
    float* scratch = scratch_.data() + kScratchFloats * thread;
    float* partials = partials_.data() + 2 * tile_floats * thread;
    const bool whole = count >= 2 * num_workers;
    int next = next_item_++, item = 0;
    for (const AttentionProblem* p = problems; p != problems + count; ++p) {
        const bool is_few = p->num_tokens <= kFewTokens;
        const int heads_each = is_few && whole ? std::min(p->num_kv_heads, kTileTokens / kFewTokens) : 1;
        for (int head = 0; head < p->num_kv_heads; head += heads_each)
            for (int begin = 0; begin < p->num_tokens; begin += kTileTokens, ++item) {
                if (item != next) continue;
                if (is_few)
                    attend_heads(*p, shared, problems, kernels, head, std::min(heads_each, p->num_kv_heads - head), scratch, partials);
                else
                    attend_tile(*p, kernels, head, begin, std::min(begin + kTileTokens, p->num_tokens), scratch, partials,
                                partials + tile_floats);
                next = next_item_++;
            }
    }
}

void FlashAttention::attend_heads(const AttentionProblem& p, const SharedChunks& shared, const AttentionProblem* problems,
                                  const AttentionKernels& kernels, int first_head, int num_heads, float* scratch, float* partials) {
    const int group = p.group_size(), floats = partial_floats(p), count = p.num_tokens * group, index = int(&p - problems);
    float* merged = partials + size_t(kTileTokens) * group * floats;
    const auto merge_all = [&](float* into, const float* from) {
        for (int i = 0; i < count; ++i) merge(into + i * floats, from + i * floats, p.value_dim);
    };
    start_partials(p, num_heads * count, merged);
    const int num_shared = shared.num_shared.empty() ? 0 : shared.num_shared[index];
    for (int chunk = 0; chunk < num_shared; ++chunk) {
        const SharedChunk& from = shared.chunks[shared.id(index, chunk)];
        const size_t token = size_t(p.q - problems[from.first].q) / p.q_token_stride;
        for (int i = 0; i < num_heads; ++i)
            merge_all(merged + i * count * floats, shared_partials(p, from, first_head + i) + token * group * floats);
    }
    for (int chunk = num_shared; chunk < num_chunks_of(p); ++chunk) {
        start_partials(p, num_heads * count, partials);
        for (int begin = chunk * kChunkKeys; begin < chunk_end(p, chunk); begin += kBlockKeys)
            for (int i = 0; i < num_heads; ++i)
                kernels.attend_keys(p, first_head + i, 0, p.num_tokens, begin, std::min(begin + kBlockKeys, chunk_end(p, chunk)), scratch,
                                    partials + i * count * floats);
        for (int i = 0; i < num_heads; ++i) merge_all(merged + i * count * floats, partials + i * count * floats);
    }
    for (int i = 0; i < num_heads * count; ++i) {
        const int query = i % count;
        write_output(p, query / group, (first_head + i / count) * group + query % group, merged + i * floats);
    }
}

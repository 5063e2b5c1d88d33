// Shares a node's work out: over KV heads and chunks of keys where there are few rows, over KV heads and
// tiles of rows where there are many. Either way a row is the same chunks merged in the same order.

#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

namespace {

constexpr int kFewRows = 8;

// Adds a chunk's partial to what the chunks before it left; log-sum-exp with the larger maximum.
void merge(float* into, const float* partial, int value_size) {
    constexpr float kNothing = -std::numeric_limits<float>::infinity();
    if (partial[0] == kNothing) return;
    const float largest = std::max(into[0], partial[0]);
    const float old_factor = into[0] == kNothing ? 0.0f : std::exp(into[0] - largest);
    const float new_factor = std::exp(partial[0] - largest);
    into[0] = largest;
    into[1] = into[1] * old_factor + partial[1] * new_factor;
    for (int d = 2; d < 2 + value_size; ++d) into[d] = into[d] * old_factor + partial[d] * new_factor;
}

void start_partial(float* partial, int value_size) {
    std::memset(partial, 0, sizeof(float) * (2 + value_size));
    partial[0] = -std::numeric_limits<float>::infinity();
}

// A row that sees no key at all becomes 0. A sink is a score without a value: it only adds to the sum.
void finish(const AttentionProblem& p, int row, int head, float* merged) {
    if (p.sinks != nullptr) {
        float sink[2 + kMaxHeadSize] = {p.sinks[head], 1.0f};
        merge(merged, sink, p.value_size);
    }
    auto* out = reinterpret_cast<float*>(p.out + row * p.out_row_stride + head * p.out_head_stride);
    const float inverse = merged[1] == 0.0f ? 0.0f : 1.0f / merged[1];
    for (int d = 0; d < p.value_size; ++d) out[d] = merged[2 + d] * inverse;
    if (p.scores == nullptr || row < p.first_scored_row) return;
    float* totals = p.totals + 2 * (size_t(row - p.first_scored_row) * p.num_heads + head);
    totals[0] = merged[0], totals[1] = inverse;
}

int num_chunks_of(const AttentionProblem& p) { return (p.num_keys + kChunkKeys - 1) / kChunkKeys; }

int chunk_end(const AttentionProblem& p, int chunk) { return std::min((chunk + 1) * kChunkKeys, p.num_keys); }

// Rows that are attended together: fewer where the threads would not all have work.
int tile_rows(const AttentionProblem& p, int num_workers) {
    int rows = kTileRows;
    while (rows > kFewRows && p.num_kv_heads * ((p.num_rows + rows - 1) / rows) < 2 * num_workers) rows /= 2;
    return rows;
}

}  // namespace

bool Attend::reserve(const AttentionProblem& p, int num_threads) {
    const size_t group_floats = size_t(p.group_size()) * partial_floats(p);
    const size_t split = size_t(p.num_rows) * p.num_kv_heads * num_chunks_of(p) * group_floats;
    const size_t tiled = 2 * size_t(kTileRows) * group_floats * num_threads;
    const size_t wanted = p.num_rows <= kFewRows ? split : tiled;
    try {
        if (partials_.size() < wanted) partials_.resize(wanted);
        if (scratch_.size() < kScratchFloats * num_threads) scratch_.resize(kScratchFloats * num_threads);
    } catch (const std::bad_alloc&) {
        return false;
    }
    reserved_threads_ = std::max(reserved_threads_, num_threads);
    return true;
}

void Attend::run(const AttentionProblem& p, const KernelSet& kernels, Team& team) {
    const int num_workers = this->num_workers(team.num_threads);
    const auto begin_anew = [this] { next_item_ = 0; };  // the partials are used again by the next node
    const auto by_workers = [&](auto work) {
        team.all([&](int thread) {
            if (thread < num_workers) work(thread);
        }, begin_anew);
    };
    if (p.num_rows > kFewRows) {
        by_workers([&](int thread) { attend_tiled(p, kernels, thread, num_workers); });
        return;
    }
    by_workers([&](int thread) { attend_split(p, kernels, thread, num_workers); });
    by_workers([&](int thread) { merge_split(p, thread, num_workers); });
}

void Attend::run(const AttentionProblem& p, const KernelSet& kernels, int thread, int num_threads) {
    ThreadOfTeam team(barrier_, thread, num_threads);
    run(p, kernels, team);
}

bool Attend::reserve_many(const AttentionProblem& p, int num_threads) {
    AttentionProblem tile = p;
    tile.num_rows = kTileRows;
    return reserve(tile, num_threads);
}

// Each takes the problems' tiles as they are free: there is one wait for all of them.
void Attend::run_many(const AttentionProblem* problems, int count, const KernelSet& kernels, int thread, int num_threads) {
    if (thread < num_workers(num_threads)) {
        const size_t tile_floats = size_t(kTileRows) * problems->group_size() * partial_floats(*problems);
        float* scratch = scratch_.data() + kScratchFloats * thread;
        float* partials = partials_.data() + 2 * tile_floats * thread;
        int mine = next_item_++, item = 0;
        for (const AttentionProblem* p = problems; p != problems + count; ++p)
            for (int kv_head = 0; kv_head < p->num_kv_heads; ++kv_head)
                for (int begin = 0; begin < p->num_rows; begin += kTileRows, ++item) {
                    if (item != mine) continue;
                    attend_tile(*p, kernels, kv_head, begin, std::min(begin + kTileRows, p->num_rows), scratch, partials,
                                partials + tile_floats);
                    mine = next_item_++;
                }
    }
    barrier_.wait(num_threads, [this] { next_item_ = 0; });
}

void Attend::start(const AttentionProblem& p, int count, float* partials) {
    for (int i = 0; i < count; ++i) start_partial(partials + i * partial_floats(p), p.value_size);
}

void Attend::add(const AttentionProblem& p, const KernelSet& kernels, int thread, float* partials) {
    float* scratch = scratch_.data() + kScratchFloats * thread;
    for (int begin = 0; begin < p.num_keys; begin += kChunkKeys)
        kernels.attend_keys(p, 0, 0, 1, begin, std::min(begin + kChunkKeys, p.num_keys), scratch, partials);
}

void Attend::attend_split(const AttentionProblem& p, const KernelSet& kernels, int thread, int num_workers) {
    const int num_chunks = num_chunks_of(p), group = p.group_size(), floats = partial_floats(p);
    const size_t item_floats = size_t(p.num_rows) * group * floats;
    float* scratch = scratch_.data() + kScratchFloats * thread;
    // The heads of a key lie side by side: a thread that takes them all reads whole lines of memory once.
    const int heads_each = num_chunks >= num_workers ? p.num_kv_heads : 1;
    const int num_items = p.num_kv_heads * num_chunks / heads_each;
    const auto attend_item = [&](int item) {
        const int chunk = item * heads_each / p.num_kv_heads, first = item * heads_each % p.num_kv_heads;
        float* partials = partials_.data() + item_floats * (chunk * p.num_kv_heads + first);
        for (int i = 0; i < heads_each * p.num_rows * group; ++i) start_partial(partials + i * floats, p.value_size);
        for (int begin = chunk * kChunkKeys; begin < chunk_end(p, chunk); begin += kBlockKeys)
            for (int i = 0; i < heads_each; ++i)
                kernels.attend_keys(p, first + i, 0, p.num_rows, begin, std::min(begin + kBlockKeys, chunk_end(p, chunk)),
                                    scratch, partials + item_floats * i);
    };
    // Runs of items, shorter towards the end: what a thread asks for ahead is then mostly its own, and no
    // thread is left with a long one.
    for (int begin = next_item_, end; begin < num_items;) {
        end = begin + std::max((num_items - begin) / (2 * num_workers), 1);
        if (!next_item_.compare_exchange_weak(begin, end)) continue;
        for (int item = begin; item < end; ++item) attend_item(item);
        begin = next_item_;
    }
}

void Attend::merge_split(const AttentionProblem& p, int thread, int num_workers) {
    const int num_chunks = num_chunks_of(p), group = p.group_size(), floats = partial_floats(p);
    const size_t item_floats = size_t(p.num_rows) * group * floats;
    float merged[2 + kMaxHeadSize];
    for (int item = thread; item < p.num_rows * p.num_heads; item += num_workers) {
        const int row = item / p.num_heads, head = item % p.num_heads, kv_head = head / group;
        start_partial(merged, p.value_size);
        for (int chunk = 0; chunk < num_chunks; ++chunk)
            merge(merged, partials_.data() + item_floats * (chunk * p.num_kv_heads + kv_head) + size_t(row * group + head % group) * floats,
                  p.value_size);
        finish(p, row, head, merged);
    }
}

void Attend::attend_tiled(const AttentionProblem& p, const KernelSet& kernels, int thread, int num_workers) {
    const int rows = tile_rows(p, num_workers), num_tiles = (p.num_rows + rows - 1) / rows;
    const size_t tile_floats = size_t(kTileRows) * p.group_size() * partial_floats(p);
    float* scratch = scratch_.data() + kScratchFloats * thread;
    float* partials = partials_.data() + 2 * tile_floats * thread;
    for (int item = next_item_++; item < p.num_kv_heads * num_tiles; item = next_item_++) {
        const int begin = item % num_tiles * rows;
        attend_tile(p, kernels, item / num_tiles, begin, std::min(begin + rows, p.num_rows), scratch, partials,
                    partials + tile_floats);
    }
}

void Attend::attend_tile(const AttentionProblem& p, const KernelSet& kernels, int kv_head, int begin, int end, float* scratch,
                         float* partials, float* merged) {
    const int group = p.group_size(), floats = partial_floats(p), count = (end - begin) * group;
    const bool rounded = p.rounded && kernels.attend_rounded != nullptr && p.num_rows > kDraftRows;
    const AttendKeys attend_keys = rounded ? kernels.attend_rounded : kernels.attend_keys;
    for (int i = 0; i < count; ++i) start_partial(merged + i * floats, p.value_size);
    for (int chunk = 0; chunk < num_chunks_of(p); ++chunk) {
        for (int i = 0; i < count; ++i) start_partial(partials + i * floats, p.value_size);
        attend_keys(p, kv_head, begin, end, chunk * kChunkKeys, chunk_end(p, chunk), scratch, partials);
        for (int i = 0; i < count; ++i) merge(merged + i * floats, partials + i * floats, p.value_size);
    }
    for (int i = 0; i < count; ++i) finish(p, begin + i / group, kv_head * group + i % group, merged + i * floats);
}

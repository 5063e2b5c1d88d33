#pragma once

// Merged key blocks of `delta` with a block size: the storage of one KV head.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/problem.h"

// Which key blocks of a KV head are merged.
struct MergeRule {
    int block_size;       // channels per block
    int num_sink_tokens;  // the first keys of the cache, which are never merged
    float threshold;      // two blocks are similar within this distance, in the unit of `scales`
    float max_share;      // the most blocks of a page to store; below 1, each page has a threshold of its own
    const float* scales;  // (key_dim), factors of the distances per channel
};

// One KV head's keys as merged blocks, in pages of kBlockKeys keys. For each block of channels, a page stores a key's
// block if its distance (root mean square over channels) to all stored blocks is above the threshold. Any other block
// is merged into the most similar stored one, and a stored block becomes the mean of what was merged into it. Errors
// do not add up, since a key is never compared with the key before it. A page depends on its own keys alone, so that
// truncating and appending again changes nothing.
class BlockStore {
public:
    // Reserves room for that many slots of the cache in the worst case. Pages of memory that are not written stay
    // untouched. Throws std::bad_alloc.
    void reserve(const AttentionProblem& problem, const MergeRule& rule, int num_slots);

    // Appends pages until there are `num_pages`, from the keys in the problem's cache.
    void advance(const AttentionProblem& problem, int kv_head, const MergeRule& rule, int num_pages);

    // Drops the pages with slots from `num_slots` on.
    void truncate(int num_slots);

    int num_pages() const { return int(exact_.size()); }
    BlockStoreView view() const { return {counts_.data(), assignments_.data(), values_.data(), offsets_.data(), exact_.data()}; }
    // The number of channels stored in the first pages.
    int64_t num_stored(int num_pages) const { return offsets_[num_pages]; }
    // The bytes of the assignments in the first pages.
    int64_t assignment_bytes(int num_pages) const { return assignment_bytes_[num_pages]; }
    size_t num_bytes() const {
        return counts_.capacity() + assignments_.capacity() + sizeof(uint16_t) * values_.capacity() +
               sizeof(uint32_t) * (offsets_.capacity() + assignment_bytes_.capacity()) + sizeof(uint64_t) * exact_.capacity();
    }

private:
    void append_page(const AttentionProblem& problem, int kv_head, const MergeRule& rule);

    std::vector<uint8_t> counts_, assignments_;               // (pages, blocks), (pages, blocks, kBlockKeys)
    std::vector<uint16_t> values_;                            // stored channels, then kStorePadding
    std::vector<uint32_t> offsets_{0}, assignment_bytes_{0};  // (pages + 1), sums over the pages before
    std::vector<uint64_t> exact_;                             // (pages)
};

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention_problem.h"

// When a block of a KV head's channels is sent.
struct StateRule {
    int block;              // so many channels are sent together
    int num_first;          // the cache's first keys, which are sent whole
    float threshold;        // how far a block may be off, as a multiple of what `scales` say
    float share;            // of a page's blocks so many are sent at the most, by a threshold of the page's own; 1: any
    const float* scales;    // (key_size), what a channel's distances are multiplied with
};

// One KV head's keys as states, page by page of kBlockKeys keys: of each block of channels a page sends what is further
// from all that it has sent there than the threshold (the root mean square of the block's distances); what is not
// joins the nearest that was sent, and what joined is seen as its mean. Errors do not add up: a key is never compared
// with the key before. A page depends on its own keys alone, so that cutting and appending again is never having cut.
class KeyStates {
public:
    // Room for so many cells of the problem's cache, whatever is sent; what is not used is not touched. Throws
    // std::bad_alloc.
    void reserve(const AttentionProblem& problem, const StateRule& rule, int num_cells);

    // Brings the store to hold so many pages at least; what it lacks is read from the problem's cache.
    void advance(const AttentionProblem& problem, int kv_head, const StateRule& rule, int num_pages);

    // Forgets the cells from `num_cells` on.
    void cut(int num_cells);

    int num_pages() const { return int(exact_.size()); }
    StateStore view() const { return {counts_.data(), members_.data(), values_.data(), begins_.data(), exact_.data()}; }
    // Of the first pages, how many channels were sent.
    int64_t num_sent(int num_pages) const { return begins_[num_pages]; }
    // And what says which groups keys are in.
    int64_t member_bytes(int num_pages) const { return member_bytes_[num_pages]; }
    size_t num_bytes() const {
        return counts_.capacity() + members_.capacity() + sizeof(uint16_t) * values_.capacity() +
               sizeof(uint32_t) * (begins_.capacity() + member_bytes_.capacity()) + sizeof(uint64_t) * exact_.capacity();
    }

private:
    void append_page(const AttentionProblem& problem, int kv_head, const StateRule& rule);

    std::vector<uint8_t> counts_, members_;  // (pages, blocks), (pages, blocks, kBlockKeys)
    std::vector<uint16_t> values_;           // channels that were sent, and kSpareHalves
    std::vector<uint32_t> begins_{0}, member_bytes_{0};  // (pages + 1), sums over the pages before
    std::vector<uint64_t> exact_;            // (pages)
};

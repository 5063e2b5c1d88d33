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

// One KV head's keys as states, page by page of kBlockKeys keys: a state repeats the one before it but for the blocks
// of channels that were sent, where the key had left it by more than the threshold (the root mean square of the
// block's distances). Errors do not add up: a key is compared with the state, never with the key before. A page
// depends on the keys up to its end alone, so that cutting and appending again is never having cut.
class KeyStates {
public:
    // Room for so many cells of the problem's cache, whatever is sent; what is not used is not touched. Throws
    // std::bad_alloc.
    void reserve(const AttentionProblem& problem, const StateRule& rule, int num_cells);

    // Brings the store to hold so many pages at least; what it lacks is read from the problem's cache.
    void advance(const AttentionProblem& problem, int kv_head, const StateRule& rule, int num_pages);

    // Forgets the cells from `num_cells` on.
    void cut(int num_cells);

    int num_pages() const { return num_pages_; }
    StateStore view() const { return {sent_.data(), values_.data(), begins_.data()}; }
    // Of the first pages, how many channels were sent, and how many are kept and multiplied: those, and each page's first.
    int64_t num_sent(int num_pages) const { return num_sent_[num_pages]; }
    int64_t num_kept(int num_pages) const { return begins_[num_pages]; }
    size_t num_bytes() const {
        return sizeof(uint16_t) * values_.capacity() + sizeof(uint64_t) * sent_.capacity() +
               sizeof(uint32_t) * (begins_.capacity() + num_sent_.capacity());
    }

private:
    void append_page(const AttentionProblem& problem, int kv_head, const StateRule& rule);
    void read_last_state(const StateRule& rule, int key_size, float* state) const;

    std::vector<uint64_t> sent_;    // (pages, blocks)
    std::vector<uint16_t> values_;  // channels that were sent, and kSpareHalves
    std::vector<uint32_t> begins_{0}, num_sent_{0};  // (pages + 1), sums over the pages before
    int num_pages_ = 0;
};

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention_problem.h"
#include "page_clusters.h"

// How far a KV head's keys are grouped. `scales` (key_size) makes distances between keys those that its
// queries see.
struct GroupRule {
    int num_groups;  // of a page of kPageKeys keys
    int num_fixed;   // the cache's first keys, which stay alone
    float lift;      // times the mean square of a group's distances from its mean is added to its scores
    const float* scales;
};

// One KV head's cache in our own form: of pages behind the window, the mean key and the mean value of each
// group, with what it adds to scores; then the rows behind those pages as they are, all in half precision.
// A page's groups depend on its own keys alone, so that cutting and appending again is never having cut.
class KeyGroups {
public:
    // Room for so many cells of the problem's cache, with `num_rows_beside` at most behind the last page;
    // throws std::bad_alloc.
    void reserve(const AttentionProblem& problem, int num_groups, int num_cells, int num_rows_beside);

    // Brings the store to hold the cells before `end`, the first `num_pages` pages of them grouped; what it
    // lacks is read from the problem's cache.
    void advance(const AttentionProblem& problem, int kv_head, const GroupRule& rule, int num_pages, int end);

    // Forgets the cells from `num_cells` on.
    void cut(int num_cells);

    int num_grouped() const { return num_pages_ * num_groups_; }
    int num_cells() const { return num_cells_; }
    int num_grouped_cells() const { return num_pages_ * kPageKeys; }
    int num_keys() const { return num_grouped() + num_cells_ - num_pages_ * kPageKeys; }
    const uint16_t* keys() const { return keys_.data(); }
    const uint16_t* values() const { return values_.data(); }
    // What a group adds to its scores, in half precision, (num_grouped): the logarithm of how many keys it has, and
    // its lift, as the mean of their weights is more than the weight of their mean.
    const uint16_t* biases() const { return biases_.data(); }
    // Writes the cells of a group's keys, up to kPageKeys, and returns how many they are.
    int list_keys(int group, int32_t* cells) const;
    size_t num_bytes() const {
        return sizeof(uint16_t) * (keys_.capacity() + values_.capacity() + biases_.capacity()) + group_of_.capacity();
    }

private:
    void append(const AttentionProblem& problem, int kv_head, int end);
    void group_page(const GroupRule& rule);
    void shift_rows(int from, int to, int count);

    std::vector<uint16_t> keys_, values_, biases_;
    std::vector<uint8_t> group_of_;  // of its page's groups that which each key is in
    int key_size_ = 0, value_size_ = 0, num_groups_ = 0;
    int num_pages_ = 0, num_cells_ = 0;
};

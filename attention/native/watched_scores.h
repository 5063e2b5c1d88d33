#pragma once

#include <cstddef>
#include <vector>

#include "attention_problem.h"

// What some heads of one row thought of each key, and what a part of the keys made of it can be exchanged for.
struct SeenByHeads {
    const float* scores;  // (num_heads, stride)
    const float* totals;  // (num_heads, 2): as AttentionProblem has them
    const float* least;   // (num_heads): what is above it got much of the head's weight
    int num_heads, stride;

    // Whether a key, or one of the kBlockKeys from `first` on, which begins a block, got much of a head's weight.
    bool favour(int key) const;
    bool favour_some(int first) const;

    // Takes the partials `less` off what the heads of `of_row`, a problem of one row, have seen, and adds `more`.
    void exchange(const AttentionProblem& of_row, const float* less, const float* more) const;
};

// The scores that problems of few rows leave behind.
class WatchedScores {
public:
    static constexpr int kMostRows = 4;

    // Room for `num_problems`, each of so many rows, up to kMostRows, heads and keys at the most; throws std::bad_alloc.
    void reserve(int num_problems, int num_rows, int num_heads, int num_keys);

    // Has a problem leave its scores.
    void watch(AttentionProblem& problem, int index);

    // What `num_heads` of the `all_heads` of a watched problem have seen of a row; more than `share` is much. By one
    // thread for each row and head.
    SeenByHeads seen(int index, int row, int all_heads, int first_head, int num_heads, float share);

    size_t num_bytes() const { return sizeof(float) * (scores_.capacity() + totals_.capacity() + least_.capacity()); }

private:
    std::vector<float> scores_, totals_, least_;
    size_t problem_lines_ = 0;
    int stride_ = 0;
};

// The part of a problem that one row and the heads of one KV head are, of keys alone.
AttentionProblem of_row_and_head(const AttentionProblem& problem, int kv_head, int row);

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention_problem.h"
#include "selection_rule.h"

// The keys that a selection layer chose, for the layers that attend to them: one set for all heads and rows.
class KeySet {
public:
    // Room for a cache of so many cells; throws std::bad_alloc.
    void reserve(int num_cells);

    // The keys of largest weight, (num_keys) floats, beside the first and the last ones; equal weights go to
    // the earlier key. Called by one thread.
    void choose(const AttentionProblem& problem, const SelectionRule& rule, const float* weights);

    // The keys that were chosen last, with the first and the last ones of this problem.
    void renew(const AttentionProblem& problem, const SelectionRule& rule);

    // Everything that is visible: the problem is too short to choose from.
    void take_all(const AttentionProblem& problem);

    // The next pass brings other rows; without `picks` the set has to be chosen anew.
    void expire() { mask_ = nullptr; }
    void forget() { picks_.clear(), expire(); }
    bool has_picks() const { return !picks_.empty(); }

    // Whether the set was made for these rows and cells. A cache of another kind (a sliding window's) has a
    // mask of its own.
    bool serves(const AttentionProblem& p) const { return mask_ == p.mask && num_keys_ == p.num_keys && num_rows_ == p.num_rows; }
    bool is_all() const { return is_all_; }
    const std::vector<int32_t>& cells() const { return cells_; }

    size_t num_bytes() const;

private:
    void made_for(const AttentionProblem& problem);
    int mark(const AttentionProblem& problem, const SelectionRule& rule);
    void mark_heaviest(int wanted, const float* weights);
    void gather();

    std::vector<int32_t> cells_, picks_;
    std::vector<uint8_t> marks_;
    std::vector<uint32_t> candidates_;
    const char* mask_ = nullptr;
    int num_keys_ = 0, num_rows_ = 0, num_forced_ = 0;
    bool is_all_ = false;
};

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "attention_problem.h"
#include "barrier.h"

// The sequences of a pass over a cache that holds several: each has rows of its own, one after the other, and
// sees the cells that all share and those of its own. A part is attended to over its cells alone, in the order
// of its tokens: the order of its sums is that of the sequence alone in a cache. Where a mask shows that the
// cells are not as they were told, parts are not taken, and that is counted.
class PassParts {
public:
    // The first `num_shared` cells are everyone's; part i has num_rows[i] rows and num_cells[i] more cells. May
    // throw bad_alloc. No parts: passes are whole again.
    void set(int num_shared, int num_parts, const int32_t* num_rows, const int32_t* const* cells, const int32_t* num_cells);

    bool active() const { return !parts_.empty(); }
    int num_parts() const { return int(parts_.size()); }
    int64_t num_refused() const { return num_refused_; }
    size_t num_bytes() const;

    // The problem of part i inside that of the whole pass.
    AttentionProblem problem(const AttentionProblem& whole, int i) const;

    // Whether the parts say what the mask says; the same for all threads, which call it together. The parts'
    // problems are there then, until the next call.
    bool agree(const AttentionProblem& whole, int layer, int num_threads);
    const AttentionProblem* problems() const { return problems_.data(); }

private:
    struct Part {
        int first_row, num_rows;
        std::vector<int32_t> cells;
    };
    bool compare(const AttentionProblem& whole) const;
    bool find(const AttentionProblem& whole);

    std::vector<Part> parts_;
    std::vector<AttentionProblem> problems_;
    std::vector<std::pair<const char*, bool>> masks_;  // of this pass, and what was found
    Barrier barrier_;
    int last_layer_ = -1;
    bool agree_ = false;
    int64_t num_refused_ = 0;
};

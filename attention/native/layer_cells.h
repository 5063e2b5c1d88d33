#pragma once

#include <cstddef>

#include "attention_problem.h"

// Where the keys and values of a layer lie, as a pass had them: for copying what one cell holds into another.
class LayerCells {
public:
    void set(const AttentionProblem& problem);
    void clear() { num_cells_ = 0; }

    // False, and nothing is copied, where there are no such cells.
    bool copy(int from, int to) const;

private:
    struct Rows {
        char* first = nullptr;
        size_t cell_stride = 0, head_stride = 0, num_bytes = 0;  // of a head's row
        void copy(int from, int to, int num_heads) const;
    };
    Rows keys_, values_;
    int num_heads_ = 0, num_cells_ = 0;
};

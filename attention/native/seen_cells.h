#pragma once

#include <cstdint>

#include "attention_problem.h"

// Which cells the rows of a pass see, where those are a beginning of the cache.

// How many cells a row sees, where those are the first ones; -1 where they are others.
inline int num_seen(const AttentionProblem& p, int row) {
    const auto* mask = reinterpret_cast<const uint16_t*>(p.mask + row * p.mask_row_stride);
    int seen = p.num_keys;
    while (seen > 0 && mask[seen - 1] == kHiddenKey) --seen;
    uint16_t any = 0;
    for (int j = 0; j < seen; ++j) any |= mask[j];
    return any == 0 ? seen : -1;
}

// The cell of the first row, where each row sees its own cell and all before it; below 0 where they see others.
inline int first_position(const AttentionProblem& p) {
    const int first = num_seen(p, p.num_rows - 1) - p.num_rows;
    bool known = first >= 0;
    for (int row = 0; known && row < p.num_rows - 1; ++row) known = num_seen(p, row) == first + row + 1;
    return known ? first : -1;
}

#pragma once

#include <utility>
#include <vector>

#include "attention_problem.h"

// How many keys the last row of a pass sees, by its mask; all layers over one cache share one mask.
class VisibleKeys {
public:
    // Layers come in order: one that does not follow the last begins another pass.
    int count(const AttentionProblem& p, int layer) {
        if (layer <= last_layer_) masks_.clear();
        last_layer_ = layer;
        for (const auto& [mask, visible] : masks_)
            if (mask == p.mask) return visible;
        const auto* mask = reinterpret_cast<const uint16_t*>(p.mask + (p.num_rows - 1) * p.mask_row_stride);
        int visible = 0;
        for (int j = 0; j < p.num_keys; ++j) visible += mask[j] != kHiddenKey;
        if (masks_.size() < masks_.capacity()) masks_.emplace_back(p.mask, visible);
        return visible;
    }

    void reserve() { masks_.reserve(16); }

private:
    std::vector<std::pair<const char*, int>> masks_;
    int last_layer_ = -1;
};

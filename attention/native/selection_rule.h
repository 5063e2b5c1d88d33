#pragma once

#include <cmath>
#include <cstdint>

// How many keys a sparse layer attends to, and which of them whatever their weight. Python fills it.
struct SelectionRule {
    int32_t num_keys;   // in all; where it is 0, `fraction` of what is visible
    float fraction;
    int32_t num_first;  // each row's first keys that it sees: attention sinks
    int32_t num_last;   // each row's last ones, its own among them
    int32_t min_visible;  // up to so many visible keys attention is dense

    // All of them where attention is to be dense.
    int budget(int num_visible) const {
        const int wanted = num_keys > 0 ? num_keys : int(std::ceil(fraction * float(num_visible)));
        return wanted >= num_visible || num_visible <= min_visible ? num_visible : wanted;
    }
};

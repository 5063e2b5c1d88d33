#pragma once

// The time of each layer in a forward pass.

#include <chrono>
#include <cstdint>

#include "c_api.h"
#include "llama/ggml_abi.h"

// Measures the time of each layer in a forward pass. The scheduler stops after the first node that reads a weight of
// another layer; everything before it counts to the layer before. One pass at a time.
class LayerTimer {
public:
    void start_pass(bool timed);

    // Called before every node is computed: whether to stop after it.
    bool should_stop(const GgmlTensor* node);

    // Called after the node was computed. Returns true: the pass goes on.
    bool on_stop();

    void add_attention(int layer, int64_t nanoseconds) { attention_[layer] += is_timing_ ? nanoseconds : 0; }

    // Since the start of the pass, in nanoseconds; 0 if the layer has not ended in it.
    int64_t end_of(int layer) const { return ends_[layer]; }
    int64_t attention_of(int layer) const { return attention_[layer]; }

private:
    std::chrono::steady_clock::time_point started_{};
    int64_t ends_[kMaxLayers] = {}, attention_[kMaxLayers] = {};
    int layer_ = -1, next_ = -1;
    bool is_timing_ = false;
};

// Starts the next forward pass, timed or not.
LOWTIDE_API void lowtide_timer_start(LayerTimer* timer, int timed);

// After a timed pass: the time when each of the first `num_layers` layers ended, and the time in lowtide's attention,
// in nanoseconds. 0 for a layer that did not run.
LOWTIDE_API void lowtide_timer_read(const LayerTimer* timer, int64_t* ends, int64_t* attention, int num_layers);

#pragma once

#include <chrono>
#include <cstdint>

#include "api.h"
#include "attention_node.h"
#include "ggml_tensor.h"

// Takes the time of each layer in a pass. The scheduler stops behind the first node that reads a weight of
// another layer; what was computed until there belongs to the layer before. One pass at a time.
class LayerClock {
public:
    void start_pass(bool timed);

    // Asked about every node before it is computed: whether to stop behind it.
    bool wants(const GgmlTensor* node);

    // Told that the node was computed; true, which goes on with the pass.
    bool stopped();

    bool is_timing() const { return timed_; }
    void add_attention(int layer, int64_t nanoseconds) { attention_[layer] += timed_ ? nanoseconds : 0; }

    // Since the pass was started, in nanoseconds: 0 where the layer has not ended in it.
    int64_t end_of(int layer) const { return ends_[layer]; }
    int64_t attention_of(int layer) const { return attention_[layer]; }

private:
    std::chrono::steady_clock::time_point started_{};
    int64_t ends_[kMaxLayers] = {}, attention_[kMaxLayers] = {};
    int layer_ = -1, next_ = -1;
    bool timed_ = false;
};

// Between passes: starts the clock of the next one, which is timed or not.
LOWTIDE_API void lowtide_clock_start(LayerClock* clock, int timed);

// After a timed pass: when each of the first `num_layers` layers ended, and how long our attention took in it, in
// nanoseconds; a layer that did not run has 0.
LOWTIDE_API void lowtide_clock_read(const LayerClock* clock, int64_t* ends, int64_t* attention, int num_layers);

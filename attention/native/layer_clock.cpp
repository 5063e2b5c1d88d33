#include "layer_clock.h"

#include <cstdio>
#include <cstring>

namespace {

constexpr int kNoLayer = -1;
constexpr int kOutput = kMaxLayers;  // behind every layer: the last norm and the output matrix

// The layer whose weight the node reads, by the names that weights have in a GGUF file.
int layer_read_by(const GgmlTensor* node) {
    for (const GgmlTensor* source : node->src) {
        if (source == nullptr) continue;
        while (source->view_src != nullptr) source = source->view_src;
        int layer = kNoLayer;
        if (std::strncmp(source->name, "blk.", 4) == 0 && std::sscanf(source->name + 4, "%d", &layer) == 1 && layer >= 0 &&
            layer < kMaxLayers)
            return layer;
        if (std::strncmp(source->name, "output", 6) == 0 && std::strstr(source->name, ".weight") != nullptr) return kOutput;
    }
    return kNoLayer;
}

}  // namespace

void LayerClock::start_pass(bool timed) {
    timed_ = timed;
    layer_ = next_ = kNoLayer;
    if (!timed) return;
    std::memset(ends_, 0, sizeof ends_);
    std::memset(attention_, 0, sizeof attention_);
    started_ = std::chrono::steady_clock::now();
}

bool LayerClock::wants(const GgmlTensor* node) {
    if (!timed_) return false;
    const int layer = layer_read_by(node);
    if (layer <= layer_) return false;  // layers follow each other: what is read once more begins none
    const bool ends_one = layer_ != kNoLayer;
    (ends_one ? next_ : layer_) = layer;
    return ends_one;
}

bool LayerClock::stopped() {
    if (!timed_ || next_ == kNoLayer) return true;
    ends_[layer_] = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - started_).count();
    layer_ = next_, next_ = kNoLayer;
    return true;
}

extern "C" void lowtide_clock_start(LayerClock* clock, int timed) { clock->start_pass(timed != 0); }

extern "C" void lowtide_clock_read(const LayerClock* clock, int64_t* ends, int64_t* attention, int num_layers) {
    for (int layer = 0; layer < num_layers && layer < kMaxLayers; ++layer)
        ends[layer] = clock->end_of(layer), attention[layer] = clock->attention_of(layer);
}

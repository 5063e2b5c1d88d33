// Times the layers of a forward pass.

#include "llama/layer_timer.h"

#include <cstdio>
#include <cstring>

namespace {

constexpr int kNoLayer = -1;
constexpr int kOutput = kMaxLayers;  // after all layers: the last norm and the output matrix

// The layer of the weight that the node reads, by the tensor names of a GGUF file.
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

void LayerTimer::start_pass(bool timed) {
    is_timing_ = timed;
    layer_ = next_ = kNoLayer;
    if (!timed) return;
    std::memset(ends_, 0, sizeof ends_);
    std::memset(attention_, 0, sizeof attention_);
    started_ = std::chrono::steady_clock::now();
}

bool LayerTimer::should_stop(const GgmlTensor* node) {
    if (!is_timing_) return false;
    const int layer = layer_read_by(node);
    if (layer <= layer_) return false;  // a weight of an earlier layer does not begin a layer
    const bool ends_one = layer_ != kNoLayer;
    (ends_one ? next_ : layer_) = layer;
    return ends_one;
}

bool LayerTimer::on_stop() {
    if (!is_timing_ || next_ == kNoLayer) return true;
    ends_[layer_] = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - started_).count();
    layer_ = next_, next_ = kNoLayer;
    return true;
}

extern "C" void lowtide_timer_start(LayerTimer* timer, int timed) { timer->start_pass(timed != 0); }

extern "C" void lowtide_timer_read(const LayerTimer* timer, int64_t* ends, int64_t* attention, int num_layers) {
    for (int layer = 0; layer < num_layers && layer < kMaxLayers; ++layer)
        ends[layer] = timer->end_of(layer), attention[layer] = timer->attention_of(layer);
}

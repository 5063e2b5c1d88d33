#pragma once

#include <cstdint>
#include <vector>

#include "onnx_attend.h"

// The masks of a pass, (rows, keys) of halves: each is made once, in room that the next pass uses again.
class OnnxMasks {
public:
    void begin(int num_past, int num_rows);

    // Returns the layer's mask, or null where its bias has another shape. Throws std::bad_alloc.
    const uint16_t* of(const OnnxLayer& layer, const OnnxRows& rows);

    int num_past() const { return num_past_; }
    int num_rows() const { return num_rows_; }
    int num_keys() const { return num_past_ + num_rows_; }
    size_t num_bytes() const;

private:
    struct Mask {
        std::vector<uint16_t> halves;
        bool is_made = false;
    };

    bool make(const OnnxLayer& layer, const OnnxRows& rows, uint16_t* halves) const;

    std::vector<Mask> masks_;
    int num_past_ = 0, num_rows_ = 0;
};

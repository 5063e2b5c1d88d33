#include "onnx_masks.h"

#include <algorithm>

#include "half.h"

namespace {

// A bias from here down weighs nothing beside any other: the key is hidden, and is not read.
constexpr float kHiding = -1e4f;

uint16_t half_of(const OnnxRows& rows, int64_t at) {
    if (rows.bias_element == OnnxRows::kBool) return reinterpret_cast<const uint8_t*>(rows.bias)[at] != 0 ? 0 : kHiddenKey;
    const float bias = rows.bias_element == OnnxRows::kF32 ? reinterpret_cast<const float*>(rows.bias)[at]
                                                           : half_to_float(reinterpret_cast<const uint16_t*>(rows.bias)[at]);
    return bias <= kHiding ? kHiddenKey : float_to_half(bias);
}

}  // namespace

void OnnxMasks::begin(int num_past, int num_rows) {
    num_past_ = num_past, num_rows_ = num_rows;
    for (Mask& mask : masks_) mask.is_made = false;
}

const uint16_t* OnnxMasks::of(const OnnxLayer& layer, const OnnxRows& rows) {
    if (size_t(layer.mask) >= masks_.size()) masks_.resize(layer.mask + 1);
    Mask& mask = masks_[layer.mask];
    const size_t size = size_t(num_rows_) * num_keys();
    if (mask.halves.size() < size) mask.halves.resize(size);
    if (!mask.is_made) mask.is_made = make(layer, rows, mask.halves.data());
    return mask.is_made ? mask.halves.data() : nullptr;
}

bool OnnxMasks::make(const OnnxLayer& layer, const OnnxRows& rows, uint16_t* halves) const {
    const int keys = num_keys();
    if (rows.bias != nullptr && (rows.bias_keys != keys || (rows.bias_rows != 1 && rows.bias_rows != num_rows_))) return false;
    for (int row = 0; row < num_rows_; ++row, halves += keys) {
        const int seen = layer.is_causal ? num_past_ + row + 1 : keys;
        const int first = layer.is_causal && layer.window > 0 ? std::max(seen - layer.window, 0) : 0;
        const int64_t bias = rows.bias_rows == 1 ? 0 : int64_t(row) * keys;
        for (int key = 0; key < keys; ++key)
            halves[key] = key < first || key >= seen ? kHiddenKey : rows.bias != nullptr ? half_of(rows, bias + key) : 0;
    }
    return true;
}

size_t OnnxMasks::num_bytes() const {
    size_t total = 0;
    for (const Mask& mask : masks_) total += sizeof(uint16_t) * mask.halves.size();
    return total;
}

#include "products.h"

namespace {

size_t aligned(size_t num_bytes) { return (num_bytes + 63) / 64 * 64; }

}  // namespace

size_t quantised_bytes(int num_rows, int num_columns) {
    const size_t values = size_t(num_rows) * num_columns, blocks = values / kBlockSize;
    return aligned(values) + aligned(blocks * sizeof(float)) + aligned(2 * blocks * sizeof(int32_t));
}

QuantisedRows quantised_rows(int num_rows, int num_columns, uint8_t* memory) {
    const size_t values = size_t(num_rows) * num_columns, blocks = values / kBlockSize;
    uint8_t* scales = memory + aligned(values);
    uint8_t* sums = scales + aligned(blocks * sizeof(float));
    return {num_rows, num_columns, reinterpret_cast<int8_t*>(memory), reinterpret_cast<float*>(scales),
            reinterpret_cast<int32_t*>(sums)};
}

#include "products.h"

namespace {

size_t aligned(size_t num_bytes) { return (num_bytes + 63) / 64 * 64; }

}  // namespace

size_t quantised_bytes(int num_rows, int num_columns) {
    const size_t values = size_t(num_rows) * num_columns;
    return aligned(values) + aligned(values / kBlockSize * sizeof(BlockScale));
}

QuantisedRows quantised_rows(int num_rows, int num_columns, uint8_t* memory) {
    uint8_t* scales = memory + aligned(size_t(num_rows) * num_columns);
    return {num_rows, num_columns, reinterpret_cast<int8_t*>(memory), reinterpret_cast<BlockScale*>(scales)};
}

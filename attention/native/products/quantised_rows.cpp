#include "products.h"

namespace {

size_t value_bytes(const QuantisedRows& rows) { return size_t(rows.num_rows) * rows.row_bytes(); }

}  // namespace

size_t quantised_bytes(int num_rows, int num_columns) {
    const QuantisedRows rows{num_rows, num_columns, nullptr, nullptr};
    return value_bytes(rows) + size_t(num_rows) * rows.scale_stride() * sizeof(BlockScale);
}

QuantisedRows quantised_rows(int num_rows, int num_columns, uint8_t* memory) {
    QuantisedRows rows{num_rows, num_columns, reinterpret_cast<int8_t*>(memory), nullptr};
    rows.scales = reinterpret_cast<BlockScale*>(memory + value_bytes(rows));
    return rows;
}

#pragma once

// Repacks weights from ggml's layout into tiles.

#include "c_api.h"
#include "matmul/repacked_matrix.h"

// The bytes of a matrix, which are the same in ggml's layout and repacked. 0 if it cannot be repacked: an unknown
// format, or columns that are no whole blocks, or rows that are no whole tiles.
LOWTIDE_API size_t lowtide_repacked_bytes(int32_t format, int64_t num_rows, int64_t num_columns);

// Repacks `num_rows` rows of ggml's blocks into tiles at `tiles`, which must not overlap them. Returns 0, or 2 if the
// matrix cannot be repacked.
LOWTIDE_API int lowtide_repack(int32_t format, const uint8_t* rows, int64_t num_rows, int64_t num_columns, uint8_t* tiles);

// Row `row` of the matrix as float32, num_columns values. The result is that of ggml's own conversion.
void dequantise_row(const RepackedMatrix& matrix, int row, float* out);

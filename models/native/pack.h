#pragma once

#include "api.h"
#include "packed_matrix.h"

// The bytes of one row in ggml's own layout, and of the whole matrix in ours; 0 for what is not known: a format,
// or columns that no whole blocks make.
size_t row_bytes(int32_t format, int64_t num_columns);
LOWTIDE_API size_t lowtide_packed_bytes(int32_t format, int64_t num_rows, int64_t num_columns);

// Lays `num_rows` rows out, whole panels of a matrix or its end, from ggml's blocks at `rows` to `panels`.
// Returns 0, or 2 for what is not known.
LOWTIDE_API int lowtide_pack(int32_t format, const uint8_t* rows, int64_t num_rows, int64_t num_columns, uint8_t* panels);

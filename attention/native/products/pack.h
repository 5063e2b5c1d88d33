#pragma once

#include "api.h"
#include "packed_matrix.h"

// The bytes of a matrix, packed or in ggml's layout: they are the same. 0 for what cannot be packed: a format that
// is not known, columns that no whole blocks make, rows that no whole panels make.
LOWTIDE_API size_t lowtide_packed_bytes(int32_t format, int64_t num_rows, int64_t num_columns);

// Lays `num_rows` rows of ggml's blocks at `rows` out as panels at `panels`, beside them in memory. Returns 0, or 2
// for what cannot be packed.
LOWTIDE_API int lowtide_pack(int32_t format, const uint8_t* rows, int64_t num_rows, int64_t num_columns, uint8_t* panels);

#pragma once

#include "packed_matrix.h"

// Row `row` of the matrix as float32, num_columns of them: what ggml's own conversion gives.
void unpack_row(const PackedMatrix& matrix, int row, float* out);

#pragma once

#include "api.h"
#include "packed_matrix.h"

// Multiplies `num_rows` rows of float32 by packed matrices of one shape and format: out is (matrices, num_rows, matrix
// rows). `kernels` names an instruction set; null takes the best. Returns 0, 1 where there is no such set or no memory,
// 2 for what cannot be.
LOWTIDE_API int lowtide_multiply(const PackedMatrix* matrices, int num_matrices, const float* rows, int num_rows, float* out,
                                 const char* kernels, int num_threads);

// Row `row` of a packed matrix as float32. Returns 0, or 2 where there is no such row.
LOWTIDE_API int lowtide_unpack_row(const PackedMatrix* matrix, int row, float* out);

// Whether this build and processor have the kernels of that name; of null, any.
LOWTIDE_API int lowtide_has_products(const char* kernels);

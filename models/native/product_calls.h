#pragma once

#include "api.h"
#include "packed_matrix.h"

// A product called on arrays, outside of any graph, with threads of its own: for tests and measurements. `rows` is
// (num_rows, columns), `out` (num_rows, rows of the matrix). Returns 0, 1 where there is no such kernel set or no
// memory, 2 for a matrix that is not known.
LOWTIDE_API int lowtide_multiply(const PackedMatrix* matrix, const float* rows, int num_rows, float* out, const char* kernels,
                                 int num_threads, int num_rounds);

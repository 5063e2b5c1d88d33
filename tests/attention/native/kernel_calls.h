#pragma once

// C entry points that call the kernels on plain arrays, with threads of their own. Tests and benchmarks load them with
// ctypes from lowtide_native_test (tests/support/native_build.py); the wheel does not have them.
//
// Each call returns 0 on success, 1 if there are no such kernels or no memory, and 2 for an unsupported shape. `kernels`
// names an instruction set; null takes the best one.

#include <cstdint>

#include "attention/problem.h"
#include "c_api.h"
#include "matmul/repacked_matrix.h"
#include "sparse/delta/delta_blocks.h"
#include "sparse/delta/delta_rows.h"
#include "sparse/tidal.h"

// For a caller to compare with its own declaration of the struct.
LOWTIDE_API size_t lowtide_test_problem_bytes();

// Exact attention.
LOWTIDE_API int lowtide_test_attend(const AttentionProblem* problem, const char* kernels, int num_threads);

// Attends like a TidalDecode selection layer. Writes the slots of the selected keys to `slots`, which has room for every
// key, and their number to `num_slots`: -1 if attention stays dense.
LOWTIDE_API int lowtide_test_select(const AttentionProblem* problem, const SelectionRule* rule, const char* kernels, int num_threads,
                                    int32_t* slots, int32_t* num_slots);

// One layer under `DeltaRowsPolicy`, which stores its clusters from call to call. Returns null for an invalid rule or if
// there is no memory. `num_read` is the result of `DeltaRowsPolicy::run`.
struct DeltaRowsLayer;
LOWTIDE_API DeltaRowsLayer* lowtide_test_delta_rows_new(const DeltaRowsRule* rule, const uint8_t* num_clusters, const float* score_bias,
                                                         const float* scales, int num_kv_heads, int key_dim);
LOWTIDE_API int lowtide_test_delta_rows_attend(DeltaRowsLayer* layer, const AttentionProblem* problem, const char* kernels,
                                               int num_threads, int* num_read);
LOWTIDE_API void lowtide_test_delta_rows_free(DeltaRowsLayer* layer);

// The same for `DeltaBlocksPolicy`. `counts` are the totals of all calls so far; a call that the policy skips adds nothing.
struct DeltaBlocksLayer;
LOWTIDE_API DeltaBlocksLayer* lowtide_test_delta_blocks_new(const DeltaBlocksRule* rule, const float* thresholds, const float* max_shares,
                                                             const float* scales, int num_kv_heads, int key_dim);
LOWTIDE_API int lowtide_test_delta_blocks_attend(DeltaBlocksLayer* layer, const AttentionProblem* problem, const char* kernels,
                                                 int num_threads, ScoreCounts* counts);
LOWTIDE_API void lowtide_test_delta_blocks_free(DeltaBlocksLayer* layer);

// Multiplies `rows` (num_rows, matrix columns) by repacked matrices of one shape and format, one after another with the
// same threads. `out` is (num_matrices, num_rows, matrix rows).
LOWTIDE_API int lowtide_test_multiply(const RepackedMatrix* matrices, int num_matrices, const float* rows, int num_rows, float* out,
                                      const char* kernels, int num_threads);

// Row `row` of a repacked matrix as float32. Returns 2 if there is no such row.
LOWTIDE_API int lowtide_test_dequantise_row(const RepackedMatrix* matrix, int row, float* out);

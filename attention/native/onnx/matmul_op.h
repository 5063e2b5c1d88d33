#pragma once

// lowtide's matmul as an operator of onnxruntime.

#include <cstdint>

#include "c_api.h"
#include "matmul/repacked_matrix.h"
#include "threads.h"

// The repacked matrices of one ONNX graph, as long as the model is open. Nodes name a matrix by its index.
class OnnxMatmul;

// For matmuls of up to `max_rows` rows on `num_threads` threads. Returns null if there is no memory or a matrix is
// not valid. The tiles stay with the caller.
LOWTIDE_API OnnxMatmul* lowtide_onnx_matmul_new(const RepackedMatrix* matrices, int num_matrices, int max_rows, int num_threads);
LOWTIDE_API void lowtide_onnx_matmul_free(OnnxMatmul* graph);

// The handle under which graph nodes find it. A handle is never used twice.
LOWTIDE_API int64_t lowtide_onnx_matmul_handle(const OnnxMatmul* graph);

// From now on, passes use at most `num_threads` of the threads.
LOWTIDE_API void lowtide_onnx_matmul_set_threads(OnnxMatmul* graph, int num_threads);

// Begins a forward pass: the quantised rows of the last one are stale.
LOWTIDE_API void lowtide_onnx_matmul_begin(OnnxMatmul* graph);

// The number of nodes computed so far, and the bytes of quantised rows.
struct OnnxMatmulCounts {
    int64_t nodes, scratch_bytes;
};
LOWTIDE_API OnnxMatmulCounts lowtide_onnx_matmul_counts(const OnnxMatmul* graph);

// The functions that a graph node calls. They return null for an unknown handle or index.
OnnxMatmul* find_onnx_matmul(int64_t handle);
const RepackedMatrix* matrix_of(const OnnxMatmul& graph, int64_t index);

// Rows of float32, and a bias that is added to each result row, or null. Inputs of the same id have the same values
// throughout a forward pass.
struct MatmulInput {
    const float* values;
    const float* bias;
    int64_t num_rows, id;
};

// How many threads are worth starting for such a matmul.
int num_useful_threads(const OnnxMatmul& graph, int64_t index, int64_t num_rows);

// Sets `out` (num_rows, rows of the matrix). Returns an error message, or null.
const char* multiply_inputs(OnnxMatmul& graph, int64_t index, const MatmulInput& input, float* out, ThreadGroup& threads);

// Sets `out` (num_ids, columns of the matrix) to rows of the matrix; zeros for an id out of range.
void gather_rows(OnnxMatmul& graph, int64_t index, const int64_t* ids, int64_t num_ids, float* out);

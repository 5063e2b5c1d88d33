#pragma once

#include <cstdint>

#include "api.h"
#include "packed_matrix.h"
#include "team.h"

// The packed matrices of one ONNX graph, whose nodes name them by their place, as long as the model is open.
class OnnxProducts;

// Products have `max_rows` rows at most, and `num_threads` threads. Null where there is no memory, or a matrix has no
// packed form. The panels stay where they are, and belong to others.
LOWTIDE_API OnnxProducts* lowtide_onnx_products_new(const PackedMatrix* matrices, int num_matrices, int max_rows, int num_threads);
LOWTIDE_API void lowtide_onnx_products_free(OnnxProducts* products);

// The number by which nodes of a graph name them; never that of others.
LOWTIDE_API int64_t lowtide_onnx_products_number(const OnnxProducts* products);

// Before each pass: rows of the last one are others now, whatever their names.
LOWTIDE_API void lowtide_onnx_products_begin(OnnxProducts* products);

// How many nodes have been computed, and the bytes of the rows in 8 bits.
struct OnnxProductCounts {
    int64_t nodes, scratch_bytes;
};
LOWTIDE_API OnnxProductCounts lowtide_onnx_products_counts(const OnnxProducts* products);

// What a node of a graph calls. Null where none has the number, or the place.
OnnxProducts* onnx_products_of(int64_t number);
const PackedMatrix* matrix_of(const OnnxProducts& products, int64_t place);

// Rows of float32, and the values that are added to each row of a product, or null. Rows of the same name have the same
// values all through a pass.
struct ProductRows {
    const float* values;
    const float* bias;
    int64_t num_rows, name;
};

// How many threads such a product is worth.
int threads_that_pay(const OnnxProducts& products, int64_t place, int64_t num_rows);

// out, (num_rows, rows of the matrix), becomes the product. Returns what is wrong, or null.
const char* multiply_rows(OnnxProducts& products, int64_t place, const ProductRows& rows, float* out, Team& team);

// out, (num_ids, columns of the matrix), becomes those rows of it; of an id that it has not, zeros.
void read_matrix_rows(OnnxProducts& products, int64_t place, const int64_t* ids, int64_t num_ids, float* out);

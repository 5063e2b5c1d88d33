#pragma once

// The interface of the matmul kernels: activations, quantised to int8 or as float32, and a table of kernels per
// instruction set.

#include <cstddef>
#include <cstdint>

#include "matmul/repacked_matrix.h"

// The scale of a block of int8 values, and the sums of its values and of each half's, times that scale.
struct BlockScale {
    float scale, sum, half_sums[2];
};

// Rows of activations in int8 with a scale per block of columns: value = q * scales[block].scale. A row of either
// array takes an odd number of cache lines, so that the same columns of neighbouring rows do not map to one cache
// set.
struct QuantisedRows {
    int num_rows, num_columns;
    int8_t* q;           // (rows, columns), row_bytes() apart
    BlockScale* scales;  // (rows, blocks), scale_stride() apart

    int num_blocks() const { return num_columns / kBlockSize; }
    size_t row_bytes() const { return odd_lines(size_t(num_columns)); }
    size_t scale_stride() const { return odd_lines(size_t(num_blocks()) * sizeof(BlockScale)) / sizeof(BlockScale); }

private:
    static constexpr size_t odd_lines(size_t num_bytes) { return ((num_bytes + 63) / 64 | 1) * 64; }
};

// The bytes of QuantisedRows of this size. Each of its arrays begins at a multiple of 64 bytes.
size_t quantised_bytes(int num_rows, int num_columns);

// Lays QuantisedRows out in `memory`, which has that many bytes.
QuantisedRows quantised_rows(int num_rows, int num_columns, uint8_t* memory);

// Rows of float32, `stride` floats apart.
struct FloatRows {
    int num_rows;
    size_t stride;
    const float* values;
};

// The kernels of one instruction set. The result of a row is bitwise the same alone and among others.
struct MatmulKernels {
    const char* name;

    // Quantises row `row`, of num_columns values.
    void (*quantise)(const float* from, const QuantisedRows& to, int row);

    // Sets out[i][j], with `out_stride` floats between rows, to row i of `rows` times row j of the matrix: for every
    // i, and for the j of tiles `begin` to `end`.
    void (*multiply)(const RepackedMatrix& matrix, const QuantisedRows& rows, int begin, int end, float* out, size_t out_stride);

    // The same for F16 and BF16 weights.
    void (*multiply_float)(const RepackedMatrix& matrix, const FloatRows& rows, int begin, int end, float* out, size_t out_stride);
};

// The best kernels for this processor, or those of that name. Null if there are none.
const MatmulKernels* find_matmul_kernels(const char* name);

const MatmulKernels* vnni512_matmul_kernels();
const MatmulKernels* vnni_matmul_kernels();
const MatmulKernels* avx2_matmul_kernels();
const MatmulKernels* i8mm_matmul_kernels();
const MatmulKernels* dot_matmul_kernels();
const MatmulKernels* portable_matmul_kernels();

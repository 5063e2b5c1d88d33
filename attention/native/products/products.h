#pragma once

#include <cstddef>
#include <cstdint>

#include "packed_matrix.h"

// What a block of columns in 8 bits is multiplied with, and so multiplied the sums of its values and of its halves'.
struct BlockScale {
    float scale, sum, half_sums[2];
};

// Rows of float32 in 8 bits, with a scale for every block of columns: q * scales[block].scale. Both take an odd number
// of cache lines a row, so that the same columns of a tile's rows do not compete for one place in the cache.
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

// What a QuantisedRows of this size takes; every part of it begins on 64 bytes.
size_t quantised_bytes(int num_rows, int num_columns);

// The parts of `memory`, which has so many bytes.
QuantisedRows quantised_rows(int num_rows, int num_columns, uint8_t* memory);

// Rows of float32 as they are, `stride` floats apart.
struct FloatRows {
    int num_rows;
    size_t stride;
    const float* values;
};

// The kernels of one instruction set. A row's result is the same bit for bit alone and among others.
struct ProductKernels {
    const char* name;

    // Quantises row `row`, of num_columns values.
    void (*quantise)(const float* from, const QuantisedRows& to, int row);

    // out[i][j], `out_stride` floats between rows, becomes row i of `rows` times row j of the matrix, for every i
    // and the js of panels `begin` to `end`.
    void (*multiply)(const PackedMatrix& matrix, const QuantisedRows& rows, int begin, int end, float* out, size_t out_stride);

    // The same of weights that are not quantised, nor are the rows.
    void (*multiply_floats)(const PackedMatrix& matrix, const FloatRows& rows, int begin, int end, float* out, size_t out_stride);
};

// The best set that the processor can run, or the one of that name; null where there is none.
const ProductKernels* find_product_kernels(const char* name);

const ProductKernels* vnni512_products();
const ProductKernels* vnni_products();
const ProductKernels* avx2_products();
const ProductKernels* i8mm_products();
const ProductKernels* dot_products();
const ProductKernels* portable_products();

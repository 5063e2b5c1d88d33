#pragma once

// The layout of repacked weights: tiles for wide dot products.
//
// A tile is kTileRows rows of the matrix, and a block is kBlockSize columns. A group is four columns: byte 4 r + j of
// group g holds column 4 g + j of row r. A tile of quantised weights has three planes, one after another, each in the
// order of its blocks:
//
//   values  8-bit formats: 8 groups of 64 bytes per block. With 4 bits, group 2 i is in the lower four bits of each
//           byte, group 2 i + 1 in the upper ones. With 2 bits there are 128 bytes per block, of groups 0 to 3 and then
//           of groups 4 to 7, the first in the lowest bits.
//   high    the bits above these. One bit: 64 bytes per block, bit g of a byte is of group g. Two bits: as above.
//   scales  fp16 per row and block; MXFP4 has an exponent of one byte instead. Formats of super-blocks have fp16 per 8
//           blocks, and ggml's bytes of small scales per 8 blocks, byte i of each row side by side.
//
// The four bits of the IQ4 formats and of MXFP4 are a place in a table of 16 values.
//
// A tile of F16 or BF16 weights is pairs of columns, 64 bytes each. F16: 16 rows of one column, then of the next one.
// BF16: the two values of each row side by side.
//
// A tile has as many bytes as its rows have in ggml's layout. So a repacked GGUF file has the size and the tensor
// offsets of the original file.
//
// Files of every instruction set include this header: free functions are static and members small, for the reason in
// attention/problem.h.

#include <cstddef>
#include <cstdint>

constexpr int kTileRows = 16;
constexpr int kBlockSize = 32;
constexpr int kSuperBlocks = 8;  // blocks that share fp16 scales in the formats of super-blocks

// The numbers are those of ggml_type.
enum class Format : int32_t {
    f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q2_k = 10, q3_k = 11, q4_k = 12, q5_k = 13, q6_k = 14,
    iq4_nl = 20, iq4_xs = 23, bf16 = 30, mxfp4 = 39
};

// The scales of a row's block, beside fp16.
enum class Scales {
    halves,           // none
    exponents,        // MXFP4: an exponent in place of fp16
    bytes,            // Q6_K: int8 for each half
    six_bits,         // Q4_K, Q5_K: six bits and a minimum of six bits
    six_bits_halves,  // Q3_K: six bits for each half, with an offset of 32
    four_bits,        // Q2_K: four bits and a minimum of four bits for each half
    six_bits_offset,  // IQ4_XS: six bits with an offset of 32
};

// Bytes of small scales per super-block.
static constexpr int small_scale_bytes(Scales scales) {
    switch (scales) {
        case Scales::halves: case Scales::exponents: return 0;
        case Scales::bytes: case Scales::four_bits: return 16;
        case Scales::six_bits: case Scales::six_bits_halves: return 12;
        case Scales::six_bits_offset: return 6;
    }
    return 0;
}

// The values that the four bits of a format stand for.
enum class Table { none, iq4, mxfp4 };

// Their values plus kTableOffset.
constexpr int kTableOffset = 128;
alignas(16) constexpr uint8_t kIq4Values[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t kMxfp4Values[16] = {128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116};

struct FormatShape {
    int value_bits;   // 2, 4 or 8 in the first plane; 16 for F16 and BF16
    int high_bits;    // 0, 1 or 2 in the second plane
    int offset;       // the stored value of zero
    bool has_minima;  // a minimum is added to every value of a block
    Scales scales;
    Table table;

    constexpr bool is_float() const { return value_bits == 16; }
    constexpr bool is_super() const { return small_scale_bytes(scales) != 0; }
    // Of a row: one, or one for each half.
    constexpr int scales_a_block() const {
        return scales == Scales::bytes || scales == Scales::six_bits_halves || scales == Scales::four_bits ? 2 : 1;
    }
};

static constexpr FormatShape shape_of(Format format) {
    switch (format) {
        case Format::f16: case Format::bf16: return {16, 0, 0, false, Scales::halves, Table::none};
        case Format::q4_0: return {4, 0, 8, false, Scales::halves, Table::none};
        case Format::q4_1: return {4, 0, 0, true, Scales::halves, Table::none};
        case Format::q5_0: return {4, 1, 16, false, Scales::halves, Table::none};
        case Format::q5_1: return {4, 1, 0, true, Scales::halves, Table::none};
        case Format::q8_0: return {8, 0, 128, false, Scales::halves, Table::none};
        case Format::q2_k: return {2, 0, 0, true, Scales::four_bits, Table::none};
        case Format::q3_k: return {2, 1, 4, false, Scales::six_bits_halves, Table::none};
        case Format::q4_k: return {4, 0, 0, true, Scales::six_bits, Table::none};
        case Format::q5_k: return {4, 1, 0, true, Scales::six_bits, Table::none};
        case Format::q6_k: return {4, 2, 32, false, Scales::bytes, Table::none};
        case Format::iq4_nl: return {4, 0, kTableOffset, false, Scales::halves, Table::iq4};
        case Format::iq4_xs: return {4, 0, kTableOffset, false, Scales::six_bits_offset, Table::iq4};
        case Format::mxfp4: return {4, 0, kTableOffset, false, Scales::exponents, Table::mxfp4};
    }
    return {};
}

static constexpr bool is_known(int32_t format) {
    switch (Format(format)) {
        case Format::q4_0: case Format::q4_1: case Format::q5_0: case Format::q5_1:
        case Format::q8_0: case Format::q2_k: case Format::q3_k: case Format::q4_k: case Format::q5_k: case Format::q6_k:
        case Format::iq4_nl: case Format::iq4_xs: case Format::mxfp4: case Format::f16: case Format::bf16: return true;
    }
    return false;
}

// Where the planes of a tile begin, in bytes. `scales` are integers; `minima` are fp16, as are `fp16_scales`, but for
// MXFP4's exponents.
struct TileLayout {
    size_t high, scales, fp16_scales, minima, num_bytes;
};

static constexpr TileLayout layout_of(Format format, int64_t num_columns) {
    const FormatShape shape = shape_of(format);
    const size_t blocks = size_t(num_columns / kBlockSize), supers = blocks / kSuperBlocks;
    const size_t scale_bytes = shape.scales == Scales::exponents ? 1 : 2;
    const size_t fp16_scales = scale_bytes * kTileRows * (shape.is_super() ? supers : blocks);
    TileLayout at{};
    at.high = blocks * (shape.value_bits * 4 * kTileRows);
    at.scales = at.high + blocks * (shape.high_bits * 4 * kTileRows);
    at.fp16_scales = at.scales + kTileRows * supers * small_scale_bytes(shape.scales);
    at.minima = at.fp16_scales + (shape.is_float() ? 0 : fp16_scales);
    at.num_bytes = at.minima + (shape.has_minima ? fp16_scales : 0);
    return at;
}

constexpr int kFloatBytes = 2;  // of an F16 or BF16 weight
constexpr int kPairBytes = 2 * kTileRows * kFloatBytes;

// Where an F16 or BF16 weight is in its tile.
static constexpr size_t float_offset(Format format, int row, int64_t column) {
    const int parity = int(column % 2), within = format == Format::f16 ? kTileRows * parity + row : 2 * row + parity;
    return size_t(column / 2) * kPairBytes + within * kFloatBytes;
}

// `num_rows` are whole tiles.
struct RepackedMatrix {
    int32_t format;
    int32_t num_rows, num_columns;
    const uint8_t* tiles;

    int num_tiles() const { return num_rows / kTileRows; }
};

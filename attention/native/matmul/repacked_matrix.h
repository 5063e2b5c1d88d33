#pragma once

// The layout of repacked weights: tiles for wide dot products.
//
// A tile is kTileRows rows of the matrix, and a block is kBlockSize columns. A group is four columns: byte 4 r + j of
// group g holds column 4 g + j of row r. A tile of quantised weights has three planes, one after another, each in the
// order of its blocks:
//
//   values  8-bit formats: 8 groups of 64 bytes per block. Others have 4 bits here: group 2 i is in the lower
//           four bits of each byte, group 2 i + 1 in the upper ones.
//   high    the bits above the fourth. One bit: 64 bytes per block, bit g of a byte is of group g. Two bits: 128
//           bytes per block, of groups 0 to 3 and then of groups 4 to 7.
//   scales  fp16 per row and block. Q6_K has int8 scales per half block. Q4_K and Q5_K have ggml's twelve bytes of
//           six-bit scales per 8 blocks, byte i of each row side by side. The K formats also have fp16 per 8 blocks.
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
constexpr int kSuperBlocks = 8;  // blocks that share fp16 scales in the K formats
constexpr int kSixBitBytes = 12;  // of eight scales and eight minima

// The numbers are those of ggml_type.
enum class Format : int32_t { f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q4_k = 12, q5_k = 13, q6_k = 14, bf16 = 30 };

struct FormatShape {
    int value_bits;      // 4 or 8 in the first plane; 16 for F16 and BF16
    int high_bits;       // 0, 1 or 2 in the second plane
    int offset;          // the stored value of zero
    bool has_minima;     // a minimum is added to every value of a block
    bool is_super;       // a K format
    int scales_a_block;  // of a row: one, or one for each half; none for F16 and BF16

    constexpr bool is_float() const { return value_bits == 16; }
    constexpr bool has_six_bits() const { return is_super && has_minima; }
};

static constexpr FormatShape shape_of(Format format) {
    switch (format) {
        case Format::f16: case Format::bf16: return {16, 0, 0, false, false, 0};
        case Format::q4_0: return {4, 0, 8, false, false, 1};
        case Format::q4_1: return {4, 0, 0, true, false, 1};
        case Format::q5_0: return {4, 1, 16, false, false, 1};
        case Format::q5_1: return {4, 1, 0, true, false, 1};
        case Format::q8_0: return {8, 0, 128, false, false, 1};
        case Format::q4_k: return {4, 0, 0, true, true, 1};
        case Format::q5_k: return {4, 1, 0, true, true, 1};
        case Format::q6_k: return {4, 2, 32, false, true, 2};
    }
    return {};
}

static constexpr bool is_known(int32_t format) {
    switch (Format(format)) {
        case Format::q4_0: case Format::q4_1: case Format::q5_0: case Format::q5_1:
        case Format::q8_0: case Format::q4_k: case Format::q5_k: case Format::q6_k:
        case Format::f16: case Format::bf16: return true;
    }
    return false;
}

// Where the planes of a tile begin, in bytes. `scales` are integers; `fp16_scales` and `minima` are fp16.
struct TileLayout {
    size_t high, scales, fp16_scales, minima, num_bytes;
};

static constexpr TileLayout layout_of(Format format, int64_t num_columns) {
    const FormatShape shape = shape_of(format);
    const size_t blocks = size_t(num_columns / kBlockSize), supers = blocks / kSuperBlocks;
    const size_t fp16_scales = 2 * kTileRows * (shape.is_super ? supers : blocks), bytes = kTileRows * blocks * shape.scales_a_block;
    TileLayout at{};
    at.high = blocks * (shape.value_bits * 4 * kTileRows);
    at.scales = at.high + blocks * (shape.high_bits * 4 * kTileRows);
    at.fp16_scales = at.scales + (shape.has_six_bits() ? kTileRows * supers * kSixBitBytes : shape.is_super ? bytes : 0);
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

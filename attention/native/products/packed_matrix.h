#pragma once

#include <cstddef>
#include <cstdint>

// Weights of one matrix, laid out for wide dot products.
//
// A panel is kPanelRows rows of the matrix; a block is kBlockSize columns of it. Byte 4 r + j of a group holds
// columns 4 g + j of row r. A panel is three planes, one after another, each in the order of its blocks:
//
//   values  of 8 bits: 8 groups of 64 bytes a block; else 4: group 2 i in the low halves of bytes and
//           group 2 i + 1 in the high ones
//   high    the bits above the fourth: 64 bytes a block where it is one (bit g of a byte for group g), 128 where
//           they are two (of groups 0 to 3, and then 4 to 7)
//   scales  halves for each row and block; of Q6_K bytes, of the other K formats ggml's twelve bytes of six bits for
//           every 8 blocks (byte i of each row side by side), and halves for every 8 blocks
//
// Of weights that are not quantised a panel is pairs of columns, 64 bytes each: of F16 the halves of 16 rows in one
// column and then in the next, of BF16 each row's two values side by side.
//
// A panel takes the very bytes that its rows take in ggml's layout: a file of packed weights has the size and the
// places of the one that it was made from.
//
// Free functions are static, here and in every header that a kernel of one instruction set includes: of a function that
// several files define the linker keeps one, which may be the one that was built for AVX-512. Members must be small
// enough to be inlined; tests/attention/test_sanitizers.py holds the kernels to it.
constexpr int kPanelRows = 16;
constexpr int kBlockSize = 32;
constexpr int kSuperBlocks = 8;  // blocks that share halves in the K formats
constexpr int kSixBitBytes = 12;  // that eight scales and eight minima of six bits take

// ggml's numbers of the formats.
enum class Format : int32_t { f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q4_k = 12, q5_k = 13, q6_k = 14, bf16 = 30 };

struct FormatShape {
    int value_bits;     // 4 or 8 in the first plane; 16 of weights that are not quantised
    int high_bits;      // 0, 1 or 2 in the second
    int offset;         // what zero is stored as
    bool has_minima;    // what is added to every value of a block
    bool is_super;      // a K format
    int scales_a_block; // of a row: one, or one for each half; none of weights that are not quantised

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

// Where the planes of a panel lie, in bytes from its beginning: `halves` are scales, `minima` too are halves.
struct PanelLayout {
    size_t high, scales, halves, minima, num_bytes;
};

static constexpr PanelLayout layout_of(Format format, int64_t num_columns) {
    const FormatShape shape = shape_of(format);
    const size_t blocks = size_t(num_columns / kBlockSize), supers = blocks / kSuperBlocks;
    const size_t halves = 2 * kPanelRows * (shape.is_super ? supers : blocks), bytes = kPanelRows * blocks * shape.scales_a_block;
    PanelLayout at{};
    at.high = blocks * (shape.value_bits * 4 * kPanelRows);
    at.scales = at.high + blocks * (shape.high_bits * 4 * kPanelRows);
    at.halves = at.scales + (shape.has_six_bits() ? kPanelRows * supers * kSixBitBytes : shape.is_super ? bytes : 0);
    at.minima = at.halves + (shape.is_float() ? 0 : halves);
    at.num_bytes = at.minima + (shape.has_minima ? halves : 0);
    return at;
}

constexpr int kFloatBytes = 2;  // of a weight that is not quantised
constexpr int kPairBytes = 2 * kPanelRows * kFloatBytes;

// Where in its panel such a weight lies.
static constexpr size_t float_place(Format format, int row, int64_t column) {
    const int parity = int(column % 2), within = format == Format::f16 ? kPanelRows * parity + row : 2 * row + parity;
    return size_t(column / 2) * kPairBytes + within * kFloatBytes;
}

// `num_rows` are whole panels.
struct PackedMatrix {
    int32_t format;
    int32_t num_rows, num_columns;
    const uint8_t* panels;

    int num_panels() const { return num_rows / kPanelRows; }
};

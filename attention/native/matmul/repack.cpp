// Repacks ggml's blocks (block_q4_0 and so on in ggml's quants) into tiles, and reads single rows of tiles. Repacking
// rounds nothing: the values stay the same.

#include "matmul/repack.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace {

constexpr int kSuperSize = kBlockSize * kSuperBlocks;

struct GgmlBlock {
    int size, num_bytes;
};

constexpr GgmlBlock ggml_block(Format format) {
    switch (format) {
        case Format::f16: case Format::bf16: return {32, 64};
        case Format::q4_0: return {32, 18};
        case Format::q4_1: return {32, 20};
        case Format::q5_0: return {32, 22};
        case Format::q5_1: return {32, 24};
        case Format::q8_0: return {32, 34};
        case Format::q2_k: return {256, 84};
        case Format::q3_k: return {256, 110};
        case Format::q4_k: return {256, 144};
        case Format::q5_k: return {256, 176};
        case Format::q6_k: return {256, 210};
        case Format::iq4_nl: return {32, 18};
        case Format::iq4_xs: return {256, 136};
        case Format::mxfp4: return {32, 17};
    }
    return {};
}

// One row's block or super-block: values with their offset, and scales.
struct Values {
    uint8_t values[kSuperSize];
    uint16_t scale = 0, minimum = 0;   // fp16; of MXFP4: the exponent
    uint8_t scales[2 * kSuperBlocks];  // of the formats of super-blocks, in ggml's layout
};

uint16_t read_fp16(const uint8_t* from) {
    uint16_t half;
    std::memcpy(&half, from, sizeof half);
    return half;
}

void read_nibbles(const uint8_t* from, uint8_t* values) {
    for (int i = 0; i < 16; ++i) values[i] = from[i] & 15, values[i + 16] = from[i] >> 4;
}

void add_fifth_bits(const uint8_t* from, uint8_t* values) {
    for (int i = 0; i < 32; ++i) values[i] |= ((from[i / 8] >> i % 8) & 1) << 4;
}

void read_k(const uint8_t* from, const uint8_t* high, const uint8_t* low, Values& to) {
    to.scale = read_fp16(from), to.minimum = read_fp16(from + 2);
    std::memcpy(to.scales, from + 4, small_scale_bytes(Scales::six_bits));
    for (int block = 0; block < kSuperBlocks; ++block)
        for (int i = 0; i < kBlockSize; ++i) {
            const uint8_t pair = low[block / 2 * kBlockSize + i];
            const int fifth = high == nullptr ? 0 : (high[i] >> block) & 1;
            to.values[block * kBlockSize + i] = uint8_t((block % 2 ? pair >> 4 : pair & 15) | fifth << 4);
        }
}

void read_q6_k(const uint8_t* from, Values& to) {
    const uint8_t *low = from, *high = from + 128;
    for (int i = 0; i < kSuperSize; ++i) {
        const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
        const uint8_t pair = low[64 * half + 32 * (quarter % 2) + l];
        const int above = (high[32 * half + l] >> 2 * quarter) & 3;
        to.values[i] = uint8_t((quarter / 2 ? pair >> 4 : pair & 15) | above << 4);
    }
    std::memcpy(to.scales, from + 192, 16);
    to.scale = read_fp16(from + 208);
}

// The lower two bits of 256 values: 32 bytes for every 128 of them.
void read_two_bits(const uint8_t* from, uint8_t* values) {
    for (int i = 0; i < kSuperSize; ++i) values[i] = from[32 * (i / 128) + i % 32] >> 2 * (i % 128 / 32) & 3;
}

void read_q2_k(const uint8_t* from, Values& to) {
    std::memcpy(to.scales, from, 16);
    read_two_bits(from + 16, to.values);
    to.scale = read_fp16(from + 80), to.minimum = read_fp16(from + 82);
}

void read_q3_k(const uint8_t* from, Values& to) {
    read_two_bits(from + 32, to.values);
    for (int i = 0; i < kSuperSize; ++i) to.values[i] |= uint8_t((from[i % 32] >> i / 32 & 1) << 2);
    std::memcpy(to.scales, from + 96, 12);
    to.scale = read_fp16(from + 108);
}

void read_iq4_xs(const uint8_t* from, Values& to) {
    to.scale = read_fp16(from);
    std::memcpy(to.scales, from + 2, 6);
    for (int block = 0; block < kSuperBlocks; ++block) read_nibbles(from + 8 + 16 * block, to.values + kBlockSize * block);
}

void read_block(Format format, const uint8_t* from, Values& to) {
    switch (format) {
        case Format::f16: case Format::bf16: break;  // not quantised: `repack_floats`
        case Format::q4_0: to.scale = read_fp16(from), read_nibbles(from + 2, to.values); break;
        case Format::q4_1: to.scale = read_fp16(from), to.minimum = read_fp16(from + 2), read_nibbles(from + 4, to.values); break;
        case Format::q5_0:
            to.scale = read_fp16(from), read_nibbles(from + 6, to.values), add_fifth_bits(from + 2, to.values);
            break;
        case Format::q5_1:
            to.scale = read_fp16(from), to.minimum = read_fp16(from + 2);
            read_nibbles(from + 8, to.values), add_fifth_bits(from + 4, to.values);
            break;
        case Format::q8_0:
            to.scale = read_fp16(from);
            for (int i = 0; i < 32; ++i) to.values[i] = from[2 + i] ^ 0x80;
            break;
        case Format::q2_k: read_q2_k(from, to); break;
        case Format::q3_k: read_q3_k(from, to); break;
        case Format::iq4_nl: to.scale = read_fp16(from), read_nibbles(from + 2, to.values); break;
        case Format::iq4_xs: read_iq4_xs(from, to); break;
        case Format::mxfp4: to.scale = from[0], read_nibbles(from + 1, to.values); break;
        case Format::q4_k: read_k(from, nullptr, from + 16, to); break;
        case Format::q5_k: read_k(from, from + 16, from + 48, to); break;
        case Format::q6_k: read_q6_k(from, to); break;
    }
}

// Writes a row's blocks into the planes of its tile.
class TileWriter {
public:
    TileWriter(Format format, int64_t num_columns, uint8_t* tile)
        : shape_(shape_of(format)), at_(layout_of(format, num_columns)), tile_(tile) {}

    void put(int row, int block, const uint8_t* values) {
        for (int k = 0; k < kBlockSize; ++k) {
            const int group = k / 4, byte = 4 * row + k % 4;
            if (shape_.value_bits == 8)
                tile_[512 * size_t(block) + 64 * group + byte] = values[k];
            else if (shape_.value_bits == 4)
                tile_[256 * size_t(block) + 64 * (group / 2) + byte] |= uint8_t((values[k] & 15) << 4 * (group % 2));
            else
                tile_[128 * size_t(block) + 64 * (group / 4) + byte] |= uint8_t((values[k] & 3) << 2 * (group % 4));
            const int above = values[k] >> shape_.value_bits;
            uint8_t* high = tile_ + at_.high + size_t(64) * shape_.high_bits * block + byte;
            if (shape_.high_bits == 1) high[0] |= uint8_t(above << group);
            if (shape_.high_bits == 2) high[64 * (group / 4)] |= uint8_t(above << 2 * (group % 4));
        }
    }

    void put_scales(int row, int first_block, const Values& from) {
        const int index = shape_.is_super() ? first_block / kSuperBlocks : first_block;
        if (shape_.scales == Scales::exponents)
            tile_[at_.fp16_scales + kTileRows * size_t(index) + row] = uint8_t(from.scale);
        else
            put_half(at_.fp16_scales, index, row, from.scale);
        if (shape_.has_minima) put_half(at_.minima, index, row, from.minimum);
        const int num_scales = small_scale_bytes(shape_.scales);
        for (int i = 0; i < num_scales; ++i) tile_[at_.scales + kTileRows * size_t(index * num_scales + i) + row] = from.scales[i];
    }

private:
    void put_half(size_t plane, int index, int row, uint16_t half) {
        std::memcpy(tile_ + plane + 2 * (kTileRows * size_t(index) + row), &half, sizeof half);
    }

    FormatShape shape_;
    TileLayout at_;
    uint8_t* tile_;
};

// Moves two-byte values to their places in pairs of columns.
void repack_floats(Format format, const uint8_t* rows, int64_t num_rows, int64_t num_columns, uint8_t* tiles) {
    for (int64_t row = 0; row < num_rows; ++row) {
        uint8_t* tile = tiles + row / kTileRows * kTileRows * kFloatBytes * num_columns;
        for (int64_t column = 0; column < num_columns; ++column, rows += kFloatBytes)
            std::memcpy(tile + float_offset(format, int(row % kTileRows), column), rows, kFloatBytes);
    }
}

}  // namespace

size_t lowtide_repacked_bytes(int32_t format, int64_t num_rows, int64_t num_columns) {
    if (!is_known(format) || num_rows <= 0 || num_columns <= 0 || num_rows % kTileRows != 0) return 0;
    const bool whole_blocks = num_columns % ggml_block(Format(format)).size == 0;
    return whole_blocks ? num_rows / kTileRows * layout_of(Format(format), num_columns).num_bytes : 0;
}

int lowtide_repack(int32_t format, const uint8_t* rows, int64_t num_rows, int64_t num_columns, uint8_t* tiles) {
    const size_t num_bytes = lowtide_repacked_bytes(format, num_rows, num_columns);
    if (num_bytes == 0) return 2;
    if (shape_of(Format(format)).is_float()) {
        repack_floats(Format(format), rows, num_rows, num_columns, tiles);
        return 0;
    }
    std::memset(tiles, 0, num_bytes);
    const GgmlBlock block = ggml_block(Format(format));
    const size_t tile_bytes = layout_of(Format(format), num_columns).num_bytes;
    for (int64_t row = 0; row < num_rows; ++row) {
        TileWriter tile(Format(format), num_columns, tiles + row / kTileRows * tile_bytes);
        for (int64_t i = 0; i < num_columns / block.size; ++i, rows += block.num_bytes) {
            Values values;
            read_block(Format(format), rows, values);
            const int first = int(i) * (block.size / kBlockSize);
            for (int b = 0; b < block.size / kBlockSize; ++b) tile.put(int(row % kTileRows), first + b, values.values + kBlockSize * b);
            tile.put_scales(int(row % kTileRows), first, values);
        }
    }
    return 0;
}

// Dequantises tiles one row at a time. Embedding lookups read few rows.

namespace {

// One row of a tile.
class TileRow {
public:
    TileRow(const RepackedMatrix& matrix, int row)
        : shape_(shape_of(Format(matrix.format))), at_(layout_of(Format(matrix.format), matrix.num_columns)),
          tile_(matrix.tiles + at_.num_bytes * (row / kTileRows)), row_(row % kTileRows) {}

    void dequantise_block(int block, float* out) const {
        const int index = shape_.is_super() ? block / kSuperBlocks : block;
        const float scale = large_scale(index), minimum = shape_.has_minima ? read_fp16(at_.minima, index) : 0.0f;
        for (int half = 0; half < 2; ++half) {
            const float by = shape_.is_super() ? scale * float(small_scale(block, half)) : scale;
            const float less = shape_.is_super() ? minimum * float(small_minimum(block, half)) : -minimum;
            for (int k = half * kBlockSize / 2; k < (half + 1) * kBlockSize / 2; ++k)
                out[k] = by * float(value(block, k) - shape_.offset) - less;
        }
    }

private:
    int value(int block, int k) const {
        const int group = k / 4, byte = 4 * row_ + k % 4;
        if (shape_.value_bits == 8) return tile_[512 * size_t(block) + 64 * group + byte];
        const int low = shape_.value_bits == 4 ? tile_[256 * size_t(block) + 64 * (group / 2) + byte] >> 4 * (group % 2) & 15
                                               : tile_[128 * size_t(block) + 64 * (group / 4) + byte] >> 2 * (group % 4) & 3;
        if (shape_.table == Table::iq4) return kIq4Values[low];
        if (shape_.table == Table::mxfp4) return kMxfp4Values[low];
        const uint8_t* high = tile_ + at_.high + size_t(64) * shape_.high_bits * block + byte;
        if (shape_.high_bits == 1) return low | (high[0] >> group & 1) << shape_.value_bits;
        if (shape_.high_bits == 2) return low | (high[64 * (group / 4)] >> 2 * (group % 4) & 3) << 4;
        return low;
    }

    // Byte `i` of the small scales of a block's super-block.
    int scale_byte(int block, int i) const {
        return tile_[at_.scales + size_t(kTileRows) * (small_scale_bytes(shape_.scales) * (block / kSuperBlocks) + i) + row_];
    }

    int small_scale(int block, int half) const {
        const int b = block % kSuperBlocks, part = 2 * b + half;
        switch (shape_.scales) {
            case Scales::six_bits: return six_bit_scale(block, false);
            case Scales::bytes: return int8_t(scale_byte(block, part));
            case Scales::four_bits: return scale_byte(block, part) & 15;
            case Scales::six_bits_halves:
                return ((scale_byte(block, part % 8) >> 4 * (part / 8) & 15) | (scale_byte(block, 8 + part % 4) >> 2 * (part / 4) & 3) << 4) - 32;
            case Scales::six_bits_offset:
                return ((scale_byte(block, 2 + b / 2) >> 4 * (b % 2) & 15) | (scale_byte(block, b / 4) >> 2 * (b % 4) & 3) << 4) - 32;
            case Scales::halves: case Scales::exponents: break;
        }
        return 1;
    }

    int small_minimum(int block, int half) const {
        if (shape_.scales == Scales::six_bits) return six_bit_scale(block, true);
        return shape_.scales == Scales::four_bits ? scale_byte(block, 2 * (block % kSuperBlocks) + half) >> 4 : 0;
    }

    // ggml's layout (get_scale_min_k4).
    int six_bit_scale(int block, bool is_minimum) const {
        const int j = block % kSuperBlocks;
        const auto index = [&](int i) { return scale_byte(block, i); };
        if (j < 4) return index(is_minimum ? j + 4 : j) & 63;
        return (is_minimum ? index(j + 4) >> 4 : index(j + 4) & 15) | index(is_minimum ? j : j - 4) >> 6 << 4;
    }

    float large_scale(int index) const {
        if (shape_.scales != Scales::exponents) return read_fp16(at_.fp16_scales, index);
        const uint32_t exponent = tile_[at_.fp16_scales + kTileRows * size_t(index) + row_];
        const uint32_t bits = exponent < 2 ? (exponent + 1) << 21 : (exponent - 1) << 23;  // half of two to its power
        float scale;
        std::memcpy(&scale, &bits, sizeof scale);
        return scale;
    }

    float read_fp16(size_t plane, int index) const {
        uint16_t half;
        std::memcpy(&half, tile_ + plane + 2 * (kTileRows * size_t(index) + row_), sizeof half);
        return fp16_to_float(half);
    }

    FormatShape shape_;
    TileLayout at_;
    const uint8_t* tile_;
    int row_;
};

float float_at(const RepackedMatrix& matrix, int row, int column) {
    const Format format = Format(matrix.format);
    const uint8_t* tile = matrix.tiles + layout_of(format, matrix.num_columns).num_bytes * (row / kTileRows);
    uint16_t value;
    std::memcpy(&value, tile + float_offset(format, row % kTileRows, column), sizeof value);
    return format == Format::f16 ? fp16_to_float(value) : bf16_to_float(value);
}

}  // namespace

void dequantise_row(const RepackedMatrix& matrix, int row, float* out) {
    if (shape_of(Format(matrix.format)).is_float()) {
        for (int column = 0; column < matrix.num_columns; ++column) out[column] = float_at(matrix, row, column);
        return;
    }
    const TileRow from(matrix, row);
    for (int block = 0; block < matrix.num_columns / kBlockSize; ++block) from.dequantise_block(block, out + kBlockSize * block);
}

// From ggml's blocks (ggml-quants: block_q4_0 and so on) to panels. Nothing is rounded: the values are the same.

#include "pack.h"

#include <algorithm>
#include <cstring>

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
        case Format::q4_k: return {256, 144};
        case Format::q5_k: return {256, 176};
        case Format::q6_k: return {256, 210};
    }
    return {};
}

// One row's part of a block, or of a super block: values with their offset, and what scales them.
struct Values {
    uint8_t values[kSuperSize];
    uint16_t scale = 0, minimum = 0;  // halves
    uint8_t scales[2 * kSuperBlocks];  // of the K formats, as ggml has them
};

uint16_t half_at(const uint8_t* from) {
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
    to.scale = half_at(from), to.minimum = half_at(from + 2);
    std::memcpy(to.scales, from + 4, kSixBitBytes);
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
    to.scale = half_at(from + 208);
}

void read_block(Format format, const uint8_t* from, Values& to) {
    switch (format) {
        case Format::f16: case Format::bf16: break;  // not quantised: `pack_floats`
        case Format::q4_0: to.scale = half_at(from), read_nibbles(from + 2, to.values); break;
        case Format::q4_1: to.scale = half_at(from), to.minimum = half_at(from + 2), read_nibbles(from + 4, to.values); break;
        case Format::q5_0:
            to.scale = half_at(from), read_nibbles(from + 6, to.values), add_fifth_bits(from + 2, to.values);
            break;
        case Format::q5_1:
            to.scale = half_at(from), to.minimum = half_at(from + 2);
            read_nibbles(from + 8, to.values), add_fifth_bits(from + 4, to.values);
            break;
        case Format::q8_0:
            to.scale = half_at(from);
            for (int i = 0; i < 32; ++i) to.values[i] = from[2 + i] ^ 0x80;
            break;
        case Format::q4_k: read_k(from, nullptr, from + 16, to); break;
        case Format::q5_k: read_k(from, from + 16, from + 48, to); break;
        case Format::q6_k: read_q6_k(from, to); break;
    }
}

// Puts a row's block into the planes of its panel.
class Panel {
public:
    Panel(Format format, int64_t num_columns, uint8_t* panel) : shape_(shape_of(format)), at_(layout_of(format, num_columns)), panel_(panel) {}

    void put(int row, int block, const uint8_t* values) {
        for (int k = 0; k < kBlockSize; ++k) {
            const int group = k / 4, byte = 4 * row + k % 4;
            if (shape_.value_bits == 8)
                panel_[512 * size_t(block) + 64 * group + byte] = values[k];
            else
                panel_[256 * size_t(block) + 64 * (group / 2) + byte] |= uint8_t((values[k] & 15) << 4 * (group % 2));
            const int above = values[k] >> 4;
            uint8_t* high = panel_ + at_.high + size_t(64) * shape_.high_bits * block + byte;
            if (shape_.high_bits == 1) high[0] |= uint8_t(above << group);
            if (shape_.high_bits == 2) high[64 * (group / 4)] |= uint8_t(above << 2 * (group % 4));
        }
    }

    void put_scales(int row, int first_block, const Values& from) {
        const int line = shape_.is_super ? first_block / kSuperBlocks : first_block;
        put_half(at_.halves, line, row, from.scale);
        if (shape_.has_minima) put_half(at_.minima, line, row, from.minimum);
        const int num_scales = !shape_.is_super ? 0 : shape_.has_minima ? kSixBitBytes : kSuperBlocks * shape_.scales_a_block;
        for (int i = 0; i < num_scales; ++i) panel_[at_.scales + kPanelRows * size_t(line * num_scales + i) + row] = from.scales[i];
    }

private:
    void put_half(size_t plane, int line, int row, uint16_t half) {
        std::memcpy(panel_ + plane + 2 * (kPanelRows * size_t(line) + row), &half, sizeof half);
    }

    FormatShape shape_;
    PanelLayout at_;
    uint8_t* panel_;
};

// Values of two bytes to their places in pairs of columns.
void pack_floats(Format format, const uint8_t* rows, int64_t num_rows, int64_t num_columns, uint8_t* panels) {
    for (int64_t row = 0; row < num_rows; ++row) {
        uint8_t* panel = panels + row / kPanelRows * kPanelRows * kFloatBytes * num_columns;
        for (int64_t column = 0; column < num_columns; ++column, rows += kFloatBytes)
            std::memcpy(panel + float_place(format, int(row % kPanelRows), column), rows, kFloatBytes);
    }
}

}  // namespace

size_t lowtide_packed_bytes(int32_t format, int64_t num_rows, int64_t num_columns) {
    if (!is_known(format) || num_rows <= 0 || num_columns <= 0 || num_rows % kPanelRows != 0) return 0;
    const bool whole_blocks = num_columns % ggml_block(Format(format)).size == 0;
    return whole_blocks ? num_rows / kPanelRows * layout_of(Format(format), num_columns).num_bytes : 0;
}

int lowtide_pack(int32_t format, const uint8_t* rows, int64_t num_rows, int64_t num_columns, uint8_t* panels) {
    const size_t num_bytes = lowtide_packed_bytes(format, num_rows, num_columns);
    if (num_bytes == 0) return 2;
    if (shape_of(Format(format)).is_float()) {
        pack_floats(Format(format), rows, num_rows, num_columns, panels);
        return 0;
    }
    std::memset(panels, 0, num_bytes);
    const GgmlBlock block = ggml_block(Format(format));
    const size_t panel_bytes = layout_of(Format(format), num_columns).num_bytes;
    for (int64_t row = 0; row < num_rows; ++row) {
        Panel panel(Format(format), num_columns, panels + row / kPanelRows * panel_bytes);
        for (int64_t i = 0; i < num_columns / block.size; ++i, rows += block.num_bytes) {
            Values values;
            read_block(Format(format), rows, values);
            const int first = int(i) * (block.size / kBlockSize);
            for (int b = 0; b < block.size / kBlockSize; ++b) panel.put(int(row % kPanelRows), first + b, values.values + kBlockSize * b);
            panel.put_scales(int(row % kPanelRows), first, values);
        }
    }
    return 0;
}

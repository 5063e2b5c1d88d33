// From panels to float32, a row at a time: for embeddings, which read few rows.

#include "unpack.h"

#include <cstring>

#include "half.h"

namespace {

// One row of a panel.
class PanelRow {
public:
    PanelRow(const PackedMatrix& matrix, int row)
        : shape_(shape_of(Format(matrix.format))), at_(layout_of(Format(matrix.format), matrix.num_columns)),
          panel_(matrix.panels + at_.num_bytes * (row / kPanelRows)), row_(row % kPanelRows) {}

    void unpack_block(int block, float* out) const {
        const int line = shape_.is_super ? block / kSuperBlocks : block;
        const float scale = half_at(at_.halves, line), minimum = shape_.has_minima ? half_at(at_.minima, line) : 0.0f;
        for (int half = 0; half < 2; ++half) {
            const float by = shape_.is_super ? scale * float(small_scale(block, half)) : scale;
            const float less = shape_.has_six_bits() ? minimum * float(six_bits(block, true)) : -minimum;
            for (int k = half * kBlockSize / 2; k < (half + 1) * kBlockSize / 2; ++k)
                out[k] = by * float(value(block, k) - shape_.offset) - less;
        }
    }

private:
    int value(int block, int k) const {
        const int group = k / 4, byte = 4 * row_ + k % 4;
        if (shape_.value_bits == 8) return panel_[512 * size_t(block) + 64 * group + byte];
        const int low = panel_[256 * size_t(block) + 64 * (group / 2) + byte] >> 4 * (group % 2) & 15;
        const uint8_t* high = panel_ + at_.high + size_t(64) * shape_.high_bits * block + byte;
        if (shape_.high_bits == 1) return low | (high[0] >> group & 1) << 4;
        if (shape_.high_bits == 2) return low | (high[64 * (group / 4)] >> 2 * (group % 4) & 3) << 4;
        return low;
    }

    int small_scale(int block, int half) const {
        if (shape_.has_six_bits()) return six_bits(block, false);
        return int8_t(panel_[at_.scales + kPanelRows * (size_t(2) * block + half) + row_]);
    }

    // As ggml has them (get_scale_min_k4).
    int six_bits(int block, bool is_minimum) const {
        const uint8_t* lines = panel_ + at_.scales + size_t(kPanelRows) * kSixBitBytes * (block / kSuperBlocks) + row_;
        const int j = block % kSuperBlocks;
        const auto line = [lines](int i) { return int(lines[kPanelRows * i]); };
        if (j < 4) return line(is_minimum ? j + 4 : j) & 63;
        return (is_minimum ? line(j + 4) >> 4 : line(j + 4) & 15) | line(is_minimum ? j : j - 4) >> 6 << 4;
    }

    float half_at(size_t plane, int line) const {
        uint16_t half;
        std::memcpy(&half, panel_ + plane + 2 * (kPanelRows * size_t(line) + row_), sizeof half);
        return half_to_float(half);
    }

    FormatShape shape_;
    PanelLayout at_;
    const uint8_t* panel_;
    int row_;
};

float float_at(const PackedMatrix& matrix, int row, int column) {
    const Format format = Format(matrix.format);
    const uint8_t* panel = matrix.panels + layout_of(format, matrix.num_columns).num_bytes * (row / kPanelRows);
    uint16_t value;
    std::memcpy(&value, panel + float_place(format, row % kPanelRows, column), sizeof value);
    return format == Format::f16 ? half_to_float(value) : bfloat_to_float(value);
}

}  // namespace

void unpack_row(const PackedMatrix& matrix, int row, float* out) {
    if (shape_of(Format(matrix.format)).is_float()) {
        for (int column = 0; column < matrix.num_columns; ++column) out[column] = float_at(matrix, row, column);
        return;
    }
    const PanelRow from(matrix, row);
    for (int block = 0; block < matrix.num_columns / kBlockSize; ++block) from.unpack_block(block, out + kBlockSize * block);
}

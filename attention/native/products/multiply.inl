// The product kernels of one instruction set for quantised weights: include it after VECTOR_FLOATS and its flags are set.
//
// A strip is W rows of a panel. Its blocks are unpacked once for up to kTileRows rows; every row's sum goes through
// the blocks in order, whatever rows are beside it.

#include "byte_dots.h"
#include "products.h"

namespace {

constexpr int kGroups = kBlockSize / 4;
constexpr int kTileRows = VECTOR_FLOATS == 4 ? 4 : 8;

template <Format F, int Group> inline void unpack_group(const uint8_t* values, const uint8_t* high, Bytes (&groups)[kGroups]) {
    constexpr FormatShape shape = shape_of(F);
    if constexpr (shape.value_bits == 8)
        groups[Group] = load_bytes(values + 64 * Group);
    else
        groups[Group] = moved<Group % 2 ? -4 : 0>(load_bytes(values + 64 * (Group / 2)), 15);
    if constexpr (shape.high_bits == 1) groups[Group] |= moved<4 - Group>(load_bytes(high), 16);
    if constexpr (shape.high_bits == 2) groups[Group] |= moved<4 - 2 * (Group % 4)>(load_bytes(high + 64 * (Group / 4)), 48);
    if constexpr (Group + 1 < kGroups) unpack_group<F, Group + 1>(values, high, groups);
}

// What a strip's values are multiplied with, and what is added to them.
struct Scales {
    Floats first, second, minimum;
};

// The six bits of a block's scale or minimum in ggml's twelve bytes (get_scale_min_k4), for W rows.
template <bool Minimum> inline Floats six_bits(const uint8_t* lines, int block) {
    const auto line = [lines](int i) { return load_small(lines + kPanelRows * i); };
    if (block < 4) return to_floats(line(Minimum ? block + 4 : block) & 63);
    const Ints low = Minimum ? line(block + 4) >> 4 : line(block + 4) & 15;
    return to_floats(low | line(Minimum ? block : block - 4) >> 6 << 4);
}

template <Format F> inline Scales scales_of(const uint8_t* panel, const PanelLayout& at, int block, int strip) {
    constexpr FormatShape shape = shape_of(F);
    const int lane = W * strip, super = block / kSuperBlocks, line = kPanelRows * (shape.is_super ? super : block) + lane;
    const Floats halves = load_halves(panel + at.halves + 2 * line);
    Scales scales{};
    if constexpr (shape.has_minima) scales.minimum = load_halves(panel + at.minima + 2 * line);
    if constexpr (shape.has_six_bits()) {
        const uint8_t* lines = panel + at.scales + kPanelRows * kSixBitBytes * super + lane;
        scales.first = halves * six_bits<false>(lines, block % kSuperBlocks);
        scales.minimum *= -six_bits<true>(lines, block % kSuperBlocks);
    } else if constexpr (shape.scales_a_block == 2) {
        const uint8_t* bytes = panel + at.scales + 2 * kPanelRows * block + lane;
        scales.first = halves * load_signed(bytes), scales.second = halves * load_signed(bytes + kPanelRows);
    } else {
        scales.first = halves;
    }
    return scales;
}

// Asks for a block's share of the next panel: where a page ends the processor itself looks no further ahead.
template <Format F> inline void fetch_ahead(const uint8_t* next_panel, int block) {
    constexpr size_t kShare = layout_of(F, kSuperBlocks * kBlockSize).num_bytes / kSuperBlocks;
    for (size_t line = 0; line < kShare; line += 64) __builtin_prefetch(next_panel + block * kShare + line);
}

// Adds half a block's products with a row of it to `dots`.
template <bool Wide> inline void add_half_block(const Bytes* groups, const int8_t* row, size_t, Ints (&dots)[1]) {
    Ints other = Ints{};
    for (int g = 0; g < kGroups / 2; g += 2) {
        dots[0] = add_dots<Wide>(dots[0], groups[g], four_bytes(row + 4 * g));
        other = add_dots<Wide>(other, groups[g + 1], four_bytes(row + 4 * g + 4));
    }
    dots[0] += other;
}

#if defined(LOWTIDE_I8MM)
// The same with two rows, `row_bytes` apart.
template <bool Wide> inline void add_half_block(const Bytes* groups, const int8_t* row, size_t row_bytes, Ints (&dots)[2]) {
    RowPair pair(dots);
    for (int g = 0; g < kGroups / 2; g += 2) pair.add<Wide>(groups[g], groups[g + 1], row + 4 * g, row + row_bytes + 4 * g);
    pair.give(dots);
}
constexpr int kMostRowsAtOnce = 2;
#else
constexpr int kMostRowsAtOnce = 1;
#endif

template <Format F, int Rows>
inline void multiply_strip(const uint8_t* panel, const PanelLayout& at, int strip, const QuantisedRows& rows, int first, Floats (&sums)[Rows]) {
    constexpr FormatShape shape = shape_of(F);
    constexpr bool kWide = shape.value_bits == 8;
    constexpr int kOffset = kWide ? kWideOffset : shape.offset;
    constexpr int kAtOnce = Rows < kMostRowsAtOnce ? Rows : kMostRowsAtOnce;
    const int num_blocks = rows.num_blocks();
    for (int i = 0; i < Rows; ++i) sums[i] = Floats{};
    for (int block = 0; block < num_blocks; ++block) {
        if (first == 0 && strip == 0) fetch_ahead<F>(panel + at.num_bytes, block);
        Bytes groups[kGroups];
        unpack_group<F, 0>(panel + size_t(block) * shape.value_bits * 4 * kPanelRows + 4 * W * strip,
                           panel + at.high + size_t(block) * shape.high_bits * 4 * kPanelRows + 4 * W * strip, groups);
        const Scales scales = scales_of<F>(panel, at, block, strip);
        for (int i = 0; i < Rows; i += kAtOnce) {
            const size_t at_block = size_t(first + i) * num_blocks + block;
            const int8_t* row = rows.q + at_block * kBlockSize;
            Ints first_dots[kAtOnce], second_dots[kAtOnce];
            for (int j = 0; j < kAtOnce; ++j) {
                const int32_t* own = rows.sums + 2 * (at_block + j * num_blocks);
                first_dots[j] = splat_int(-kOffset * own[0]), second_dots[j] = splat_int(-kOffset * own[1]);
            }
            add_half_block<kWide>(groups, row, num_blocks * kBlockSize, first_dots);
            add_half_block<kWide>(groups + kGroups / 2, row + kBlockSize / 2, num_blocks * kBlockSize, second_dots);
            for (int j = 0; j < kAtOnce; ++j) {
                const size_t at_row = at_block + j * num_blocks;
                const float scale = rows.scales[at_row];
                Floats& sum = sums[i + j];
                if constexpr (shape.scales_a_block == 2) {
                    sum = fused(to_floats(first_dots[j]), scales.first * scale, sum);
                    sum = fused(to_floats(second_dots[j]), scales.second * scale, sum);
                } else {
                    sum = fused(to_floats(first_dots[j] + second_dots[j]), scales.first * scale, sum);
                }
                if constexpr (shape.has_minima)
                    sum = fused(scales.minimum, splat(scale * float(rows.sums[2 * at_row] + rows.sums[2 * at_row + 1])), sum);
            }
        }
    }
}

template <Format F, int Rows>
void multiply_tile(const PackedMatrix& matrix, int panel, const QuantisedRows& rows, int first, float* out, size_t out_stride) {
    const PanelLayout at = layout_of(F, matrix.num_columns);
    const uint8_t* from = matrix.panels + at.num_bytes * panel;
    for (int strip = 0; strip < kPanelRows / W; ++strip) {
        Floats sums[Rows];
        multiply_strip<F, Rows>(from, at, strip, rows, first, sums);
        for (int i = 0; i < Rows; ++i) store(out + (first + i) * out_stride + kPanelRows * panel + W * strip, sums[i]);
    }
}

template <Format F, int Rows = kTileRows>
inline void multiply_rest(const PackedMatrix& matrix, int panel, const QuantisedRows& rows, int first, float* out, size_t out_stride) {
    for (; first + Rows <= rows.num_rows; first += Rows) multiply_tile<F, Rows>(matrix, panel, rows, first, out, out_stride);
    if constexpr (Rows > 1) multiply_rest<F, Rows / 2>(matrix, panel, rows, first, out, out_stride);
}

template <Format F>
void multiply_panels(const PackedMatrix& matrix, const QuantisedRows& rows, int begin, int end, float* out, size_t out_stride) {
    for (int panel = begin; panel < end; ++panel) multiply_rest<F>(matrix, panel, rows, 0, out, out_stride);
}

void multiply(const PackedMatrix& matrix, const QuantisedRows& rows, int begin, int end, float* out, size_t out_stride) {
    switch (Format(matrix.format)) {
        case Format::q4_0: return multiply_panels<Format::q4_0>(matrix, rows, begin, end, out, out_stride);
        case Format::q4_1: return multiply_panels<Format::q4_1>(matrix, rows, begin, end, out, out_stride);
        case Format::q5_0: return multiply_panels<Format::q5_0>(matrix, rows, begin, end, out, out_stride);
        case Format::q5_1: return multiply_panels<Format::q5_1>(matrix, rows, begin, end, out, out_stride);
        case Format::q8_0: return multiply_panels<Format::q8_0>(matrix, rows, begin, end, out, out_stride);
        case Format::q4_k: return multiply_panels<Format::q4_k>(matrix, rows, begin, end, out, out_stride);
        case Format::q5_k: return multiply_panels<Format::q5_k>(matrix, rows, begin, end, out, out_stride);
        case Format::q6_k: return multiply_panels<Format::q6_k>(matrix, rows, begin, end, out, out_stride);
        case Format::f16: case Format::bf16: break;  // not quantised: `multiply_floats`
    }
}

// To the nearest of 255 steps of the block's largest value. A value that is no number counts as none.
void quantise(const float* from, const QuantisedRows& to, int row) {
    typedef int8_t Few __attribute__((vector_size(W), aligned(1), may_alias));
    constexpr int kVectors = kBlockSize / W;
    constexpr float kToWhole = 12582912.0f;  // added and taken off again, it rounds
    for (int block = 0; block < to.num_blocks(); ++block, from += kBlockSize) {
        const size_t at = size_t(row) * to.num_blocks() + block;
        Floats values[kVectors], most = Floats{};
        for (int i = 0; i < kVectors; ++i) {
            values[i] = load(from + W * i);
            const Floats size = values[i] > 0.0f ? values[i] : -values[i];
            most = size > most ? size : most;
        }
        const float scale = largest_of_lanes(most) / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        Floats sums[2] = {};
        for (int i = 0; i < kVectors; ++i) {
            const Floats steps = values[i] * inverse, known = steps == steps ? steps : Floats{};
            const Floats above = known > splat(-127.0f) ? known : splat(-127.0f), inside = above < splat(127.0f) ? above : splat(127.0f);
            const Floats nearest = inside + kToWhole - kToWhole;
            *reinterpret_cast<Few*>(to.q + at * kBlockSize + W * i) = __builtin_convertvector(__builtin_convertvector(nearest, Ints), Few);
            sums[2 * i / kVectors] += nearest;
        }
        for (int half = 0; half < 2; ++half) to.sums[2 * at + half] = int32_t(sum_of_lanes(sums[half]));
        to.scales[at] = scale;
    }
}

}  // namespace

// The product kernels of one instruction set for quantised weights: include it after VECTOR_FLOATS and its flags are set.
//
// A strip is W rows of a panel. Its blocks are unpacked once for up to kTileRows rows; every row's sum goes through
// the blocks in order, whatever rows are beside it.

#include "byte_dots.h"
#include "products.h"

namespace {

constexpr int kGroups = kBlockSize / 4;
constexpr int kTileRows = VECTOR_FLOATS == 4 ? 4 : VECTOR_FLOATS;

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

// What each part of a block's values is multiplied with, and what is added to them.
template <int Parts> struct Scales {
    Floats factors[Parts], added[Parts];
};

// The six bits of a block's scale or minimum in ggml's twelve bytes (get_scale_min_k4), for W rows.
template <bool Minimum> inline Floats six_bits(const uint8_t* lines, int block) {
    const auto line = [lines](int i) { return load_small(lines + kPanelRows * i); };
    if (block < 4) return to_floats(line(Minimum ? block + 4 : block) & 63);
    const Ints low = Minimum ? line(block + 4) >> 4 : line(block + 4) & 15;
    return to_floats(low | line(Minimum ? block : block - 4) >> 6 << 4);
}

// `offset` is what zero is in the values.
template <Format F> inline auto scales_of(const uint8_t* panel, const PanelLayout& at, int block, int strip, int offset) {
    constexpr FormatShape shape = shape_of(F);
    const int lane = W * strip, super = block / kSuperBlocks, line = kPanelRows * (shape.is_super ? super : block) + lane;
    const Floats halves = load_halves(panel + at.halves + 2 * line);
    Scales<shape.scales_a_block> scales{};
    if constexpr (shape.has_six_bits()) {
        const uint8_t* lines = panel + at.scales + kPanelRows * kSixBitBytes * super + lane;
        scales.factors[0] = halves * six_bits<false>(lines, block % kSuperBlocks);
        scales.added[0] = load_halves(panel + at.minima + 2 * line) * -six_bits<true>(lines, block % kSuperBlocks);
    } else if constexpr (shape.has_minima) {
        scales.factors[0] = halves, scales.added[0] = load_halves(panel + at.minima + 2 * line);
    } else {
        const uint8_t* bytes = panel + at.scales + kPanelRows * shape.scales_a_block * block + lane;
        for (int part = 0; part < shape.scales_a_block; ++part) {
            scales.factors[part] = shape.is_super ? halves * to_floats(load_small_signed(bytes + kPanelRows * part)) : halves;
            scales.added[part] = scales.factors[part] * float(-offset);
        }
    }
    return scales;
}

// Asks for a block's share of the next panel: where a page ends the processor itself looks no further ahead.
template <Format F> inline void fetch_ahead(const uint8_t* next_panel, int block) {
    constexpr size_t kShare = layout_of(F, kSuperBlocks * kBlockSize).num_bytes / kSuperBlocks;
    for (size_t line = 0; line < kShare; line += 64) __builtin_prefetch(next_panel + block * kShare + line);
}

// Adds the products of some groups with some rows' shares of a block, `row_bytes` apart, to `dots`.
template <bool Wide, int Groups, int Rows>
inline void add_groups(const Bytes* groups, const int8_t* row, size_t row_bytes, Ints (&dots)[Rows]) {
#if defined(LOWTIDE_I8MM)
    if constexpr (Rows == 2) {
        RowPair pair(dots);
        for (int g = 0; g < Groups; g += 2) pair.add<Wide>(groups[g], groups[g + 1], row + 4 * g, row + row_bytes + 4 * g);
        return pair.give(dots);
    }
#endif
    for (int g = 0; g < Groups; ++g)
        for (int i = 0; i < Rows; ++i) dots[i] = add_dots<Wide>(dots[i], groups[g], four_bytes(row + i * row_bytes + 4 * g));
}

// Side by side, so that none waits for its own last step.
#if VECTOR_FLOATS == 16
constexpr int kMostRowsAtOnce = 4;
#elif defined(LOWTIDE_I8MM)
constexpr int kMostRowsAtOnce = 2;
#else
constexpr int kMostRowsAtOnce = 1;
#endif

template <Format F, int Rows>
inline void multiply_strip(const uint8_t* panel, const PanelLayout& at, int strip, const QuantisedRows& rows, int first, Floats (&sums)[Rows]) {
    constexpr FormatShape shape = shape_of(F);
    constexpr bool kWide = shape.value_bits == 8;
    constexpr int kOffset = kWide ? kWideOffset : shape.offset;
    constexpr int kParts = shape.scales_a_block, kPartGroups = kGroups / kParts, kPartSize = kBlockSize / kParts;
    constexpr int kAtOnce = Rows < kMostRowsAtOnce ? Rows : kMostRowsAtOnce;
    const int num_blocks = rows.num_blocks();
    const size_t row_bytes = rows.row_bytes(), scale_stride = rows.scale_stride();
    for (int i = 0; i < Rows; ++i) sums[i] = Floats{};
    for (int block = 0; block < num_blocks; ++block) {
        if (first == 0 && strip == 0) fetch_ahead<F>(panel + at.num_bytes, block);
        Bytes groups[kGroups];
        unpack_group<F, 0>(panel + size_t(block) * shape.value_bits * 4 * kPanelRows + 4 * W * strip,
                           panel + at.high + size_t(block) * shape.high_bits * 4 * kPanelRows + 4 * W * strip, groups);
        const Scales<kParts> scales = scales_of<F>(panel, at, block, strip, kOffset);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; i += kAtOnce) {
            const int8_t* row = rows.q + (first + i) * row_bytes + block * kBlockSize;
            const BlockScale* of_rows = rows.scales + (first + i) * scale_stride + block;
            for (int part = 0; part < kParts; ++part) {
                Ints dots[kAtOnce] = {};
                add_groups<kWide, kPartGroups>(groups + part * kPartGroups, row + part * kPartSize, row_bytes, dots);
                for (int j = 0; j < kAtOnce; ++j) {
                    const BlockScale& of_row = of_rows[j * scale_stride];
                    sums[i + j] = fused(to_floats(dots[j]), scales.factors[part] * of_row.scale, sums[i + j]);
                    if constexpr (shape.has_minima || kOffset != 0)
                        sums[i + j] = fused(scales.added[part], splat(kParts == 1 ? of_row.sum : of_row.half_sums[part]), sums[i + j]);
                }
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

// Panels that rows are multiplied with before the next rows are read: long rows do not stay in a core's own cache.
constexpr size_t kGroupBytes = 256 << 10;

template <Format F, int Rows = kTileRows>
inline void multiply_rest(const PackedMatrix& matrix, int begin, int end, const QuantisedRows& rows, int first, float* out, size_t out_stride) {
    for (; first + Rows <= rows.num_rows; first += Rows)
        for (int panel = begin; panel < end; ++panel) multiply_tile<F, Rows>(matrix, panel, rows, first, out, out_stride);
    if constexpr (Rows > 1) multiply_rest<F, Rows / 2>(matrix, begin, end, rows, first, out, out_stride);
}

template <Format F>
void multiply_panels(const PackedMatrix& matrix, const QuantisedRows& rows, int begin, int end, float* out, size_t out_stride) {
    const size_t panel_bytes = layout_of(F, matrix.num_columns).num_bytes;
    const int of_group = panel_bytes < kGroupBytes ? int(kGroupBytes / panel_bytes) : 1;
    for (int first = begin; first < end; first += of_group) {
        const int last = end - first < of_group ? end : first + of_group;
        multiply_rest<F>(matrix, first, last, rows, 0, out, out_stride);
    }
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
    constexpr int kVectors = kBlockSize / W;
    constexpr float kToWhole = 12582912.0f;  // added and taken off again, it rounds
    for (int block = 0; block < to.num_blocks(); ++block, from += kBlockSize) {
        int8_t* q = to.q + size_t(row) * to.row_bytes() + block * kBlockSize;
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
            store_small(q + W * i, __builtin_convertvector(nearest, Ints));
            sums[2 * i / kVectors] += nearest;
        }
        const float first = sum_of_lanes(sums[0]), second = sum_of_lanes(sums[1]);
        to.scales[size_t(row) * to.scale_stride() + block] = {scale, scale * (first + second), {scale * first, scale * second}};
    }
}

}  // namespace

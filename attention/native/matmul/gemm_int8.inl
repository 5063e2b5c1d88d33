// The matmul kernel of one instruction set for quantised weights. Include it after VECTOR_FLOATS is defined.
//
// A strip is W rows of a tile. Each of its blocks is decoded once for up to kRowsAtOnce rows of activations. Every
// sum goes through the blocks in order, whatever rows are beside it.

#include "matmul/dot_int8.h"
#include "matmul/kernels.h"

namespace {

constexpr int kGroups = kBlockSize / 4;
constexpr int kRowsAtOnce = VECTOR_FLOATS == 4 ? 4 : VECTOR_FLOATS;

template <Format F, int Group> inline void decode_group(const uint8_t* values, const uint8_t* high, Bytes (&groups)[kGroups]) {
    constexpr FormatShape shape = shape_of(F);
    if constexpr (shape.value_bits == 8)
        groups[Group] = load_bytes(values + 64 * Group);
    else if constexpr (shape.value_bits == 4)
        groups[Group] = shift_bytes<Group % 2 ? -4 : 0>(load_bytes(values + 64 * (Group / 2)), 15);
    else
        groups[Group] = shift_bytes<-2 * (Group % 4)>(load_bytes(values + 64 * (Group / 4)), 3);
    constexpr int low_bits = shape.value_bits;
    if constexpr (shape.high_bits == 1) groups[Group] |= shift_bytes<low_bits - Group>(load_bytes(high), uint8_t(1 << low_bits));
    if constexpr (shape.high_bits == 2) groups[Group] |= shift_bytes<4 - 2 * (Group % 4)>(load_bytes(high + 64 * (Group / 4)), 48);
    if constexpr (shape.table == Table::iq4) groups[Group] = look_up(kIq4Values, groups[Group]);
    if constexpr (shape.table == Table::mxfp4) groups[Group] = look_up(kMxfp4Values, groups[Group]);
    if constexpr (Group + 1 < kGroups) decode_group<F, Group + 1>(values, high, groups);
}

// The factors of each part of a block's values, and what is added.
template <int Parts> struct BlockScales {
    Floats factors[Parts], added[Parts];
};

// The six bits of a block's scale or minimum in ggml's twelve bytes (get_scale_min_k4), for W rows.
template <bool Minimum> inline Floats six_bit_scale(const uint8_t* bytes, int block) {
    const auto index = [bytes](int i) { return load_u8(bytes + kTileRows * i); };
    if (block < 4) return to_floats(index(Minimum ? block + 4 : block) & 63);
    const Ints low = Minimum ? index(block + 4) >> 4 : index(block + 4) & 15;
    return to_floats(low | index(Minimum ? block : block - 4) >> 6 << 4);
}

// The small scale of a block's part, for W rows, in the layouts of Q6_K, Q3_K, Q2_K and IQ4_XS.
template <Scales S> inline Ints small_scale(const uint8_t* bytes, int block, int half) {
    const auto index = [bytes](int i) { return load_u8(bytes + kTileRows * i); };
    const int part = 2 * block + half;
    if constexpr (S == Scales::bytes) return load_i8(bytes + kTileRows * part);
    if constexpr (S == Scales::four_bits) return index(part) & 15;
    if constexpr (S == Scales::six_bits_halves)
        return ((index(part % 8) >> 4 * (part / 8) & 15) | (index(8 + part % 4) >> 2 * (part / 4) & 3) << 4) - 32;
    return ((index(2 + block / 2) >> 4 * (block % 2) & 15) | (index(block / 4) >> 2 * (block % 4) & 3) << 4) - 32;
}

// Half of two to the power of MXFP4's exponents, for W rows.
inline Floats exponent_scale(const uint8_t* from) {
    const Ints exponents = load_u8(from), subnormal = (exponents + 1) << 21;
    return Floats(exponents < 2 ? subnormal : (exponents - 1) << 23);
}

// `offset` is the stored value of zero.
template <Format F> inline auto scales_of(const uint8_t* tile, const TileLayout& at, int block, int strip, int offset) {
    constexpr FormatShape shape = shape_of(F);
    const int lane = W * strip, super = block / kSuperBlocks, index = kTileRows * (shape.is_super() ? super : block) + lane;
    const uint8_t* bytes = tile + at.scales + kTileRows * small_scale_bytes(shape.scales) * super + lane;
    Floats large;
    if constexpr (shape.scales == Scales::exponents)
        large = exponent_scale(tile + at.fp16_scales + index);
    else
        large = load_fp16(tile + at.fp16_scales + 2 * index);
    BlockScales<shape.scales_a_block()> scales{};
    if constexpr (shape.scales == Scales::six_bits) {
        scales.factors[0] = large * six_bit_scale<false>(bytes, block % kSuperBlocks);
        scales.added[0] = load_fp16(tile + at.minima + 2 * index) * -six_bit_scale<true>(bytes, block % kSuperBlocks);
    } else if constexpr (shape.has_minima && !shape.is_super()) {
        scales.factors[0] = large, scales.added[0] = load_fp16(tile + at.minima + 2 * index);
    } else {
        for (int half = 0; half < shape.scales_a_block(); ++half) {
            scales.factors[half] = large;
            if constexpr (shape.is_super()) scales.factors[half] = large * to_floats(small_scale<shape.scales>(bytes, block % kSuperBlocks, half));
            scales.added[half] = scales.factors[half] * float(-offset);
            if constexpr (shape.scales == Scales::four_bits)
                scales.added[half] = load_fp16(tile + at.minima + 2 * index) *
                                     to_floats(-(load_u8(bytes + kTileRows * (2 * (block % kSuperBlocks) + half)) >> 4));
        }
    }
    return scales;
}

// Prefetches a block's share of the next tile: the processor's own prefetcher stops at the end of a page.
template <Format F> inline void prefetch_tile(const uint8_t* next_tile, int block) {
    constexpr size_t kShare = layout_of(F, kSuperBlocks * kBlockSize).num_bytes / kSuperBlocks;
    for (size_t index = 0; index < kShare; index += 64) __builtin_prefetch(next_tile + block * kShare + index);
}

// Adds the dot products of some groups with a block of some rows, `row_bytes` apart, to `dots`.
template <bool Wide, int Groups, int Rows>
inline void add_groups(const Bytes* groups, const int8_t* row, size_t row_bytes, Ints (&dots)[Rows]) {
#if defined(LOWTIDE_I8MM)
    if constexpr (Rows == 2) {
        RowPair pair(dots);
        for (int g = 0; g < Groups; g += 2) pair.add<Wide>(groups[g], groups[g + 1], row + 4 * g, row + row_bytes + 4 * g);
        return pair.store(dots);
    }
#endif
    for (int g = 0; g < Groups; ++g)
        for (int i = 0; i < Rows; ++i) dots[i] = add_dots<Wide>(dots[i], groups[g], load_4_bytes(row + i * row_bytes + 4 * g));
}

// Rows whose sums run side by side, so that none waits for its own last step.
#if VECTOR_FLOATS == 16
constexpr int kMaxDotRows = 4;
#elif defined(LOWTIDE_I8MM)
constexpr int kMaxDotRows = 2;
#else
constexpr int kMaxDotRows = 1;
#endif

template <Format F, int Rows>
inline void multiply_strip(const uint8_t* tile, const TileLayout& at, int strip, const QuantisedRows& rows, int first,
                           Floats (&sums)[Rows]) {
    constexpr FormatShape shape = shape_of(F);
    constexpr bool kWide = shape.value_bits == 8 || shape.table == Table::iq4 || shape.table == Table::mxfp4;
    constexpr int kOffset = kWide ? kWideOffset : shape.offset;
    constexpr int kParts = shape.scales_a_block(), kPartGroups = kGroups / kParts, kPartSize = kBlockSize / kParts;
    constexpr int kDotRows = Rows < kMaxDotRows ? Rows : kMaxDotRows;
    const int num_blocks = rows.num_blocks();
    const size_t row_bytes = rows.row_bytes(), scale_stride = rows.scale_stride();
    for (int i = 0; i < Rows; ++i) sums[i] = Floats{};
    for (int block = 0; block < num_blocks; ++block) {
        if (first == 0 && strip == 0) prefetch_tile<F>(tile + at.num_bytes, block);
        Bytes groups[kGroups];
        decode_group<F, 0>(tile + size_t(block) * shape.value_bits * 4 * kTileRows + 4 * W * strip,
                           tile + at.high + size_t(block) * shape.high_bits * 4 * kTileRows + 4 * W * strip, groups);
        const BlockScales<kParts> scales = scales_of<F>(tile, at, block, strip, kOffset);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; i += kDotRows) {
            const int8_t* row = rows.q + (first + i) * row_bytes + block * kBlockSize;
            const BlockScale* row_scales = rows.scales + (first + i) * scale_stride + block;
            for (int half = 0; half < kParts; ++half) {
                Ints dots[kDotRows] = {};
                add_groups<kWide, kPartGroups>(groups + half * kPartGroups, row + half * kPartSize, row_bytes, dots);
                for (int j = 0; j < kDotRows; ++j) {
                    const BlockScale& row_scale = row_scales[j * scale_stride];
                    sums[i + j] = fma(to_floats(dots[j]), scales.factors[half] * row_scale.scale, sums[i + j]);
                    if constexpr (shape.has_minima || kOffset != 0)
                        sums[i + j] = fma(scales.added[half], splat(kParts == 1 ? row_scale.sum : row_scale.half_sums[half]), sums[i + j]);
                }
            }
        }
    }
}

template <Format F, int Rows>
void multiply_tile(const RepackedMatrix& matrix, int tile, const QuantisedRows& rows, int first, float* out, size_t out_stride) {
    const TileLayout at = layout_of(F, matrix.num_columns);
    const uint8_t* from = matrix.tiles + at.num_bytes * tile;
    for (int strip = 0; strip < kTileRows / W; ++strip) {
        Floats sums[Rows];
        multiply_strip<F, Rows>(from, at, strip, rows, first, sums);
        for (int i = 0; i < Rows; ++i) store(out + (first + i) * out_stride + kTileRows * tile + W * strip, sums[i]);
    }
}

// So many bytes of tiles are multiplied before the next rows are read: long rows do not stay in a core's cache.
constexpr size_t kCacheBytes = 256 << 10;

template <Format F, int Rows = kRowsAtOnce>
inline void multiply_rows(const RepackedMatrix& matrix, int begin, int end, const QuantisedRows& rows, int first, float* out,
                          size_t out_stride) {
    for (; first + Rows <= rows.num_rows; first += Rows)
        for (int tile = begin; tile < end; ++tile) multiply_tile<F, Rows>(matrix, tile, rows, first, out, out_stride);
    if constexpr (Rows > 1) multiply_rows<F, Rows / 2>(matrix, begin, end, rows, first, out, out_stride);
}

template <Format F>
void multiply_tiles(const RepackedMatrix& matrix, const QuantisedRows& rows, int begin, int end, float* out, size_t out_stride) {
    const size_t tile_bytes = layout_of(F, matrix.num_columns).num_bytes;
    const int tiles_at_once = tile_bytes < kCacheBytes ? int(kCacheBytes / tile_bytes) : 1;
    for (int first = begin; first < end; first += tiles_at_once) {
        const int last = end - first < tiles_at_once ? end : first + tiles_at_once;
        multiply_rows<F>(matrix, first, last, rows, 0, out, out_stride);
    }
}

void multiply(const RepackedMatrix& matrix, const QuantisedRows& rows, int begin, int end, float* out, size_t out_stride) {
    switch (Format(matrix.format)) {
        case Format::q4_0: return multiply_tiles<Format::q4_0>(matrix, rows, begin, end, out, out_stride);
        case Format::q4_1: return multiply_tiles<Format::q4_1>(matrix, rows, begin, end, out, out_stride);
        case Format::q5_0: return multiply_tiles<Format::q5_0>(matrix, rows, begin, end, out, out_stride);
        case Format::q5_1: return multiply_tiles<Format::q5_1>(matrix, rows, begin, end, out, out_stride);
        case Format::q8_0: return multiply_tiles<Format::q8_0>(matrix, rows, begin, end, out, out_stride);
        case Format::q2_k: return multiply_tiles<Format::q2_k>(matrix, rows, begin, end, out, out_stride);
        case Format::q3_k: return multiply_tiles<Format::q3_k>(matrix, rows, begin, end, out, out_stride);
        case Format::iq4_nl: return multiply_tiles<Format::iq4_nl>(matrix, rows, begin, end, out, out_stride);
        case Format::iq4_xs: return multiply_tiles<Format::iq4_xs>(matrix, rows, begin, end, out, out_stride);
        case Format::mxfp4: return multiply_tiles<Format::mxfp4>(matrix, rows, begin, end, out, out_stride);
        case Format::q4_k: return multiply_tiles<Format::q4_k>(matrix, rows, begin, end, out, out_stride);
        case Format::q5_k: return multiply_tiles<Format::q5_k>(matrix, rows, begin, end, out, out_stride);
        case Format::q6_k: return multiply_tiles<Format::q6_k>(matrix, rows, begin, end, out, out_stride);
        case Format::f16: case Format::bf16: break;  // not quantised: `multiply_float`
    }
}

// Rounds to the nearest of 255 steps of the block's largest value. NaN becomes zero.
void quantise(const float* from, const QuantisedRows& to, int row) {
    constexpr int kVectors = kBlockSize / W;
    constexpr float kToWhole = 12582912.0f;  // adding and subtracting it rounds to a whole number
    for (int block = 0; block < to.num_blocks(); ++block, from += kBlockSize) {
        int8_t* q = to.q + size_t(row) * to.row_bytes() + block * kBlockSize;
        Floats values[kVectors], largest_abs = Floats{};
        for (int i = 0; i < kVectors; ++i) {
            values[i] = load(from + W * i);
            const Floats size = values[i] > 0.0f ? values[i] : -values[i];
            largest_abs = size > largest_abs ? size : largest_abs;
        }
        const float scale = largest_of_lanes(largest_abs) / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        Floats sums[2] = {};
        for (int i = 0; i < kVectors; ++i) {
            const Floats steps = values[i] * inverse, finite_steps = steps == steps ? steps : Floats{};
            const Floats above = finite_steps > splat(-127.0f) ? finite_steps : splat(-127.0f),
                         inside = above < splat(127.0f) ? above : splat(127.0f);
            const Floats nearest = inside + kToWhole - kToWhole;
            store_i8(q + W * i, __builtin_convertvector(nearest, Ints));
            sums[2 * i / kVectors] += nearest;
        }
        const float first = sum_of_lanes(sums[0]), second = sum_of_lanes(sums[1]);
        to.scales[size_t(row) * to.scale_stride() + block] = {scale, scale * (first + second), {scale * first, scale * second}};
    }
}

}  // namespace

// The matmul kernel of one instruction set for F16 and BF16 weights, in float32. Include it after VECTOR_FLOATS is
// defined.
//
// A strip is W rows of a tile. Several strips go through the columns together, so that no sum waits for its own last
// step. Every sum takes the columns in order, whatever rows and strips are beside it.

#include "matmul/dot_int8.h"
#include "matmul/kernels.h"

namespace {

constexpr int kStrips = kTileRows / W;  // of a tile
constexpr int kFloatRowsAtOnce = VECTOR_FLOATS == 4 ? 4 : 8;
constexpr int kSums = VECTOR_FLOATS == 16 ? 16 : 8;  // that fit into registers, beside their operands
constexpr size_t kPrefetchBytes = 2048;  // the processor's own prefetcher stops at the end of a page

// W rows of weights in two neighbouring columns.
struct Pair {
    Floats even, odd;
};

template <Format F> inline Pair load_pair(const uint8_t* from) {
    if constexpr (F == Format::f16) return {load_fp16(from), load_fp16(from + kTileRows * kFloatBytes)};
    const Ints both = *reinterpret_cast<const Ints*>(from);
    return {Floats(both << 16), Floats(both & -65536)};
}

// The first pair of a strip, which begins at row W * strip of the matrix.
template <Format F> inline const uint8_t* strip_at(const RepackedMatrix& matrix, int strip) {
    const int first = W * (strip % kStrips), bytes_a_row = F == Format::f16 ? kFloatBytes : 2 * kFloatBytes;
    return matrix.tiles + size_t(strip / kStrips) * matrix.num_columns * kTileRows * kFloatBytes + first * bytes_a_row;
}

template <Format F, int KvRow, int Strips>
inline void multiply_float_tile(const RepackedMatrix& matrix, int strip, const FloatRows& rows, int first, float* out, size_t out_stride) {
    const uint8_t* from[Strips];
    Floats sums[KvRow][Strips] = {};
    for (int s = 0; s < Strips; ++s) from[s] = strip_at<F>(matrix, strip + s);
    const float* values[KvRow];
    for (int i = 0; i < KvRow; ++i) values[i] = rows.values + (first + i) * rows.stride;
    for (int column = 0; column < matrix.num_columns; column += 2) {
        Pair pairs[Strips];
        for (int s = 0; s < Strips; ++s) pairs[s] = load_pair<F>(from[s] + size_t(column / 2) * kPairBytes);
        for (int s = 0; s < Strips && first == 0; s += kStrips)
            __builtin_prefetch(from[s] + size_t(column / 2) * kPairBytes + kPrefetchBytes);
        for (int i = 0; i < KvRow; ++i) {
            const Floats even = splat(values[i][column]), odd = splat(values[i][column + 1]);
            for (int s = 0; s < Strips; ++s) sums[i][s] = fma(pairs[s].odd, odd, fma(pairs[s].even, even, sums[i][s]));
        }
    }
    for (int i = 0; i < KvRow; ++i)
        for (int s = 0; s < Strips; ++s) store(out + (first + i) * out_stride + W * (strip + s), sums[i][s]);
}

template <Format F, int Strips, int KvRow = kFloatRowsAtOnce>
inline void multiply_float_rows(const RepackedMatrix& matrix, int strip, const FloatRows& rows, int first, float* out, size_t out_stride) {
    for (; first + KvRow <= rows.num_rows; first += KvRow)
        multiply_float_tile<F, KvRow, Strips>(matrix, strip, rows, first, out, out_stride);
    if constexpr (KvRow > 1) multiply_float_rows<F, Strips, KvRow / 2>(matrix, strip, rows, first, out, out_stride);
}

template <Format F>
void multiply_float_tiles(const RepackedMatrix& matrix, const FloatRows& rows, int begin, int end, float* out, size_t out_stride) {
    constexpr int kMaxStrips = 4, kStripsAtOnce = kSums / kFloatRowsAtOnce;
    int strip = begin * kStrips;
    const int last = end * kStrips;
    if (rows.num_rows < kFloatRowsAtOnce)
        for (; strip + kMaxStrips <= last; strip += kMaxStrips)
            multiply_float_rows<F, kMaxStrips, kFloatRowsAtOnce / 2>(matrix, strip, rows, 0, out, out_stride);
    for (; strip + kStripsAtOnce <= last; strip += kStripsAtOnce)
        multiply_float_rows<F, kStripsAtOnce>(matrix, strip, rows, 0, out, out_stride);
    for (; strip < last; ++strip) multiply_float_rows<F, 1>(matrix, strip, rows, 0, out, out_stride);
}

void multiply_float(const RepackedMatrix& matrix, const FloatRows& rows, int begin, int end, float* out, size_t out_stride) {
    if (Format(matrix.format) == Format::f16) return multiply_float_tiles<Format::f16>(matrix, rows, begin, end, out, out_stride);
    multiply_float_tiles<Format::bf16>(matrix, rows, begin, end, out, out_stride);
}

}  // namespace

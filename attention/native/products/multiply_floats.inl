// The product kernels of one instruction set for weights that are not quantised: they and the rows are multiplied as
// float32. Include it after VECTOR_FLOATS and its flags are set.
//
// A strip is W rows of a panel. Several strips go through the columns together, so that no sum waits for its last
// step; every sum takes the columns in order, whatever rows and strips are beside it.

#include "byte_dots.h"
#include "products.h"

namespace {

constexpr int kStrips = kPanelRows / W;  // of a panel
constexpr int kFloatRows = VECTOR_FLOATS == 4 ? 4 : 8;
constexpr int kSums = VECTOR_FLOATS == 16 ? 16 : 8;  // that fit the registers beside what they are made from
constexpr size_t kAheadBytes = 2048;  // asked for early: where a page ends the processor itself looks no further

// W rows of weights in two columns that are neighbours.
struct Pair {
    Floats even, odd;
};

template <Format F> inline Pair load_pair(const uint8_t* from) {
    if constexpr (F == Format::f16) return {load_halves(from), load_halves(from + kPanelRows * kFloatBytes)};
    const Ints both = *reinterpret_cast<const Ints*>(from);
    return {Floats(both << 16), Floats(both & -65536)};
}

// The first pair of a strip, of W rows from row W * strip of the matrix on.
template <Format F> inline const uint8_t* strip_at(const PackedMatrix& matrix, int strip) {
    const int first = W * (strip % kStrips), bytes_a_row = F == Format::f16 ? kFloatBytes : 2 * kFloatBytes;
    return matrix.panels + size_t(strip / kStrips) * matrix.num_columns * kPanelRows * kFloatBytes + first * bytes_a_row;
}

template <Format F, int Rows, int Strips>
inline void multiply_float_tile(const PackedMatrix& matrix, int strip, const FloatRows& rows, int first, float* out, size_t out_stride) {
    const uint8_t* from[Strips];
    Floats sums[Rows][Strips] = {};
    for (int s = 0; s < Strips; ++s) from[s] = strip_at<F>(matrix, strip + s);
    const float* values[Rows];
    for (int i = 0; i < Rows; ++i) values[i] = rows.values + (first + i) * rows.stride;
    for (int column = 0; column < matrix.num_columns; column += 2) {
        Pair pairs[Strips];
        for (int s = 0; s < Strips; ++s) pairs[s] = load_pair<F>(from[s] + size_t(column / 2) * kPairBytes);
        for (int s = 0; s < Strips && first == 0; s += kStrips) __builtin_prefetch(from[s] + size_t(column / 2) * kPairBytes + kAheadBytes);
        for (int i = 0; i < Rows; ++i) {
            const Floats even = splat(values[i][column]), odd = splat(values[i][column + 1]);
            for (int s = 0; s < Strips; ++s) sums[i][s] = fused(pairs[s].odd, odd, fused(pairs[s].even, even, sums[i][s]));
        }
    }
    for (int i = 0; i < Rows; ++i)
        for (int s = 0; s < Strips; ++s) store(out + (first + i) * out_stride + W * (strip + s), sums[i][s]);
}

template <Format F, int Strips, int Rows = kFloatRows>
inline void multiply_float_rows(const PackedMatrix& matrix, int strip, const FloatRows& rows, int first, float* out, size_t out_stride) {
    for (; first + Rows <= rows.num_rows; first += Rows) multiply_float_tile<F, Rows, Strips>(matrix, strip, rows, first, out, out_stride);
    if constexpr (Rows > 1) multiply_float_rows<F, Strips, Rows / 2>(matrix, strip, rows, first, out, out_stride);
}

template <Format F>
void multiply_float_panels(const PackedMatrix& matrix, const FloatRows& rows, int begin, int end, float* out, size_t out_stride) {
    constexpr int kMost = 4, kMany = kSums / kFloatRows;
    int strip = begin * kStrips;
    const int last = end * kStrips;
    if (rows.num_rows < kFloatRows)
        for (; strip + kMost <= last; strip += kMost) multiply_float_rows<F, kMost, kFloatRows / 2>(matrix, strip, rows, 0, out, out_stride);
    for (; strip + kMany <= last; strip += kMany) multiply_float_rows<F, kMany>(matrix, strip, rows, 0, out, out_stride);
    for (; strip < last; ++strip) multiply_float_rows<F, 1>(matrix, strip, rows, 0, out, out_stride);
}

void multiply_floats(const PackedMatrix& matrix, const FloatRows& rows, int begin, int end, float* out, size_t out_stride) {
    if (Format(matrix.format) == Format::f16) return multiply_float_panels<Format::f16>(matrix, rows, begin, end, out, out_stride);
    multiply_float_panels<Format::bf16>(matrix, rows, begin, end, out, out_stride);
}

}  // namespace

// Matmuls and row lookups of one graph's repacked matrices over several forward passes, against the same matrices
// dequantised and multiplied in plain loops. Rows of one id are quantised once per pass; ids have other rows in the
// next. The thread group uses real threads, or runs one after another. Buffers have exactly the needed size.

#include "onnx/matmul_op.h"

#include <cmath>
#include <memory>
#include <vector>

#include "checks.h"
#include "simd.h"
#include "matmul/repack.h"
#include "random_threads.h"
#include "matmul/repack.h"

namespace {

struct Matrix {
    RepackedMatrix packed;
    std::vector<uint8_t> tiles;

    Matrix(Format format, int block_bytes, int num_rows, int num_columns)
        : packed{int32_t(format), num_rows, num_columns, nullptr}, tiles(lowtide_repacked_bytes(int32_t(format), num_rows, num_columns)) {
        std::vector<uint8_t> blocks(tiles.size());
        for (uint8_t& byte : blocks) byte = uint8_t(pick(0, 255));
        const uint16_t small = float_to_fp16(0.01f);
        const int num_halves = format == Format::q4_1 ? 2 : 1;
        for (size_t at = 0; at < blocks.size(); at += block_bytes)
            for (int i = 0; i < num_halves; ++i) blocks[at + 2 * i] = uint8_t(small & 255), blocks[at + 2 * i + 1] = uint8_t(small >> 8);
        require(lowtide_repack(packed.format, blocks.data(), num_rows, num_columns, tiles.data()) == 0, "the matrix cannot be repacked");
        packed.tiles = tiles.data();
    }
};

struct Inputs {
    int count, columns;
    std::vector<float> values;

    // Every block has a value of 127, so nothing is rounded.
    Inputs(int num_rows, int num_columns) : count(num_rows), columns(num_columns), values(size_t(num_rows) * num_columns) {
        for (float& value : values) value = float(pick(-127, 127));
        for (size_t i = 0; i < values.size(); i += kBlockSize) values[i] = 127.0f;
    }
};

void check_matmul(OnnxMatmul& graph, const RepackedMatrix& matrix, int64_t index, const Inputs& rows, int64_t name, bool has_bias) {
    std::vector<float> bias(matrix.num_rows), out(size_t(rows.count) * matrix.num_rows, NAN), weights(matrix.num_columns);
    for (float& value : bias) value = float(pick(-100, 100));
    RandomThreadGroup threads(std::min(num_useful_threads(graph, index, rows.count), pick(1, 3)));
    const char* wrong =
        multiply_inputs(graph, index, {rows.values.data(), has_bias ? bias.data() : nullptr, rows.count, name}, out.data(), threads);
    require(wrong == nullptr, "%s", wrong);
    for (int row = 0; row < matrix.num_rows; ++row) {
        dequantise_row(matrix, row, weights.data());
        for (int i = 0; i < rows.count; ++i) {
            double sum = has_bias ? bias[row] : 0, size = std::fabs(sum);
            for (int k = 0; k < matrix.num_columns; ++k) {
                const double term = double(weights[k]) * rows.values[size_t(i) * matrix.num_columns + k];
                sum += term, size += std::fabs(term);
            }
            require(std::fabs(out[size_t(i) * matrix.num_rows + row] - sum) <= 1e-5 * size, "a matmul is wrong");
        }
    }
}

void check_gather(OnnxMatmul& graph, const RepackedMatrix& matrix, int64_t index) {
    const std::vector<int64_t> ids = {matrix.num_rows - 1, 0, -1, matrix.num_rows, pick(0, matrix.num_rows - 1)};
    std::vector<float> out(ids.size() * matrix.num_columns, NAN), reference(matrix.num_columns);
    gather_rows(graph, index, ids.data(), int64_t(ids.size()), out.data());
    for (size_t i = 0; i < ids.size(); ++i) {
        const bool is_there = ids[i] >= 0 && ids[i] < matrix.num_rows;
        std::fill(reference.begin(), reference.end(), 0.0f);
        if (is_there) dequantise_row(matrix, int(ids[i]), reference.data());
        for (int k = 0; k < matrix.num_columns; ++k) require(out[i * matrix.num_columns + k] == reference[k], "the wrong row is read");
    }
}

}  // namespace

int main() {
    constexpr int kMaxTokens = 40, kNumThreads = 3;
    // Wide enough to be worth several threads, and not.
    const Matrix matrices[] = {
        {Format::q4_0, 18, 96, 64}, {Format::q4_1, 20, 64, 64}, {Format::q8_0, 34, 320, 96}, {Format::q4_0, 18, 16, 96}};
    std::vector<RepackedMatrix> packed;
    for (const Matrix& matrix : matrices) packed.push_back(matrix.packed);
    const int count = int(packed.size());

    require(lowtide_onnx_matmul_new(packed.data(), 0, kMaxTokens, kNumThreads) == nullptr, "an empty list of matrices is accepted");
    std::vector<RepackedMatrix> odd = packed;
    odd.back().num_rows = 17;
    require(lowtide_onnx_matmul_new(odd.data(), count, kMaxTokens, kNumThreads) == nullptr, "17 rows are accepted");

    OnnxMatmul* graph = lowtide_onnx_matmul_new(packed.data(), count, kMaxTokens, kNumThreads);
    require(graph != nullptr, "no memory");
    const int64_t handle = lowtide_onnx_matmul_handle(graph);
    require(find_onnx_matmul(handle) == graph && find_onnx_matmul(handle + 1) == nullptr, "another handle finds it");
    require(matrix_of(*graph, -1) == nullptr && matrix_of(*graph, count) == nullptr, "an index beyond the matrices is found");
    int64_t num_nodes = 0;
    for (int pass = 0; pass < 20; ++pass) {
        lowtide_onnx_matmul_begin(graph);
        const int num_rows = pick(0, 1) ? 1 : pick(2, kMaxTokens);
        const Inputs narrow(num_rows, 64), wide(num_rows, 96), other(num_rows, 96);
        check_matmul(*graph, packed[0], 0, narrow, 0, pick(0, 1) != 0);
        check_matmul(*graph, packed[1], 1, narrow, 0, pick(0, 1) != 0);
        check_matmul(*graph, packed[2], 2, wide, 1, false);
        check_matmul(*graph, packed[3], 3, other, 2, true);
        check_matmul(*graph, packed[2], 2, other, 2, false);
        check_gather(*graph, packed[2], 2);
        num_nodes += 6;
    }
    const Inputs many(kMaxTokens + 40, 96);
    std::vector<float> out(size_t(many.count) * packed[2].num_rows);
    RandomThreadGroup threads(1);
    require(multiply_inputs(*graph, 2, {many.values.data(), nullptr, many.count, 9}, out.data(), threads) != nullptr,
            "more rows than reserved are accepted");
    require(lowtide_onnx_matmul_counts(graph).nodes == num_nodes, "nodes are not counted");
    lowtide_onnx_matmul_free(graph);
    require(find_onnx_matmul(handle) == nullptr, "its handle is found after it is gone");
    std::printf("%d matmuls agree\n", int(num_nodes));
}

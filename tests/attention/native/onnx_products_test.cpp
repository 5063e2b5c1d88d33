// Products and look-ups of one graph's packed matrices, pass after pass, against the same matrices unpacked and
// multiplied in plain loops. Rows of one name are quantised once a pass; names come back with other rows in the next.
// The work of a team's threads is done by real threads, or by one after another. Arrays are of exactly their size.

#include "onnx_products.h"

#include <cmath>
#include <memory>
#include <vector>

#include "checks.h"
#include "half.h"
#include "pack.h"
#include "some_team.h"
#include "unpack.h"

namespace {

struct Matrix {
    PackedMatrix packed;
    std::vector<uint8_t> panels;

    Matrix(Format format, int block_bytes, int num_rows, int num_columns)
        : packed{int32_t(format), num_rows, num_columns, nullptr}, panels(lowtide_packed_bytes(int32_t(format), num_rows, num_columns)) {
        std::vector<uint8_t> blocks(panels.size());
        for (uint8_t& byte : blocks) byte = uint8_t(pick(0, 255));
        const uint16_t small = float_to_half(0.01f);
        const int num_halves = format == Format::q4_1 ? 2 : 1;
        for (size_t at = 0; at < blocks.size(); at += block_bytes)
            for (int i = 0; i < num_halves; ++i) blocks[at + 2 * i] = uint8_t(small & 255), blocks[at + 2 * i + 1] = uint8_t(small >> 8);
        require(lowtide_pack(packed.format, blocks.data(), num_rows, num_columns, panels.data()) == 0, "it cannot be packed");
        packed.panels = panels.data();
    }
};

struct Rows {
    int count, columns;
    std::vector<float> values;

    // Every block has a value of 127: nothing is rounded.
    Rows(int count, int columns) : count(count), columns(columns), values(size_t(count) * columns) {
        for (float& value : values) value = float(pick(-127, 127));
        for (size_t i = 0; i < values.size(); i += kBlockSize) values[i] = 127.0f;
    }
};

void check_product(OnnxProducts& products, const PackedMatrix& matrix, int64_t place, const Rows& rows, int64_t name, bool has_bias) {
    std::vector<float> bias(matrix.num_rows), out(size_t(rows.count) * matrix.num_rows, NAN), weights(matrix.num_columns);
    for (float& value : bias) value = float(pick(-100, 100));
    SomeTeam team(std::min(threads_that_pay(products, place, rows.count), pick(1, 3)));
    const char* wrong = multiply_rows(products, place, {rows.values.data(), has_bias ? bias.data() : nullptr, rows.count, name}, out.data(), team);
    require(wrong == nullptr, "%s", wrong);
    for (int row = 0; row < matrix.num_rows; ++row) {
        unpack_row(matrix, row, weights.data());
        for (int i = 0; i < rows.count; ++i) {
            double sum = has_bias ? bias[row] : 0, size = std::fabs(sum);
            for (int k = 0; k < matrix.num_columns; ++k) {
                const double product = double(weights[k]) * rows.values[size_t(i) * matrix.num_columns + k];
                sum += product, size += std::fabs(product);
            }
            require(std::fabs(out[size_t(i) * matrix.num_rows + row] - sum) <= 1e-5 * size, "a product is wrong");
        }
    }
}

void check_look_up(OnnxProducts& products, const PackedMatrix& matrix, int64_t place) {
    const std::vector<int64_t> ids = {matrix.num_rows - 1, 0, -1, matrix.num_rows, pick(0, matrix.num_rows - 1)};
    std::vector<float> out(ids.size() * matrix.num_columns, NAN), wanted(matrix.num_columns);
    read_matrix_rows(products, place, ids.data(), int64_t(ids.size()), out.data());
    for (size_t i = 0; i < ids.size(); ++i) {
        const bool is_there = ids[i] >= 0 && ids[i] < matrix.num_rows;
        std::fill(wanted.begin(), wanted.end(), 0.0f);
        if (is_there) unpack_row(matrix, int(ids[i]), wanted.data());
        for (int k = 0; k < matrix.num_columns; ++k) require(out[i * matrix.num_columns + k] == wanted[k], "another row is read");
    }
}

}  // namespace

int main() {
    constexpr int kMostRows = 40, kNumThreads = 3;
    // Wide enough that threads pay, and not.
    const Matrix matrices[] = {{Format::q4_0, 18, 96, 64}, {Format::q4_1, 20, 64, 64}, {Format::q8_0, 34, 320, 96}, {Format::q4_0, 18, 16, 96}};
    std::vector<PackedMatrix> packed;
    for (const Matrix& matrix : matrices) packed.push_back(matrix.packed);
    const int count = int(packed.size());

    require(lowtide_onnx_products_new(packed.data(), 0, kMostRows, kNumThreads) == nullptr, "no matrices are taken");
    std::vector<PackedMatrix> odd = packed;
    odd.back().num_rows = 17;
    require(lowtide_onnx_products_new(odd.data(), count, kMostRows, kNumThreads) == nullptr, "17 rows are packed");

    OnnxProducts* products = lowtide_onnx_products_new(packed.data(), count, kMostRows, kNumThreads);
    require(products != nullptr, "no memory");
    const int64_t number = lowtide_onnx_products_number(products);
    require(onnx_products_of(number) == products && onnx_products_of(number + 1) == nullptr, "another number finds it");
    require(matrix_of(*products, -1) == nullptr && matrix_of(*products, count) == nullptr, "there are more matrices");
    int64_t num_nodes = 0;
    for (int pass = 0; pass < 20; ++pass) {
        lowtide_onnx_products_begin(products);
        const int num_rows = pick(0, 1) ? 1 : pick(2, kMostRows);
        const Rows narrow(num_rows, 64), wide(num_rows, 96), other(num_rows, 96);
        check_product(*products, packed[0], 0, narrow, 0, pick(0, 1) != 0);
        check_product(*products, packed[1], 1, narrow, 0, pick(0, 1) != 0);
        check_product(*products, packed[2], 2, wide, 1, false);
        check_product(*products, packed[3], 3, other, 2, true);
        check_product(*products, packed[2], 2, other, 2, false);
        check_look_up(*products, packed[2], 2);
        num_nodes += 6;
    }
    const Rows many(kMostRows + 40, 96);
    std::vector<float> out(size_t(many.count) * packed[2].num_rows);
    SomeTeam team(1);
    require(multiply_rows(*products, 2, {many.values.data(), nullptr, many.count, 9}, out.data(), team) != nullptr, "more rows than there is room for");
    require(lowtide_onnx_products_counts(products).nodes == num_nodes, "nodes are not counted");
    lowtide_onnx_products_free(products);
    require(onnx_products_of(number) == nullptr, "its number outlives it");
    std::printf("%d products agree\n", int(num_nodes));
}

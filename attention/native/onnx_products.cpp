#include "onnx_products.h"

#include <algorithm>
#include <new>
#include <vector>

#include "numbered.h"
#include "pack.h"
#include "product.h"
#include "unpack.h"

namespace {

// Below so many products, and so many values to round, a second thread comes later than one is done.
constexpr int64_t kProductsWorthAThread = 60000, kValuesWorthAThread = 8000;

}  // namespace

class OnnxProducts : public Numbered<OnnxProducts> {
public:
    OnnxProducts(const ProductKernels& kernels, const PackedMatrix* matrices, int num_matrices, int num_threads)
        : kernels(kernels), matrices(matrices, matrices + num_matrices), num_threads(num_threads) {}

    const ProductKernels& kernels;
    const std::vector<PackedMatrix> matrices;
    const int num_threads;
    Product product;
    int64_t num_nodes = 0;

    void begin() { has_rows_ = false; }

    void multiply(const PackedMatrix& matrix, const ProductRows& rows, float* out, Team& team) {
        const int num_rows = int(rows.num_rows), columns = matrix.num_columns;
        if (!shape_of(Format(matrix.format)).is_float() && !(has_rows_ && name_ == rows.name)) {
            if (rows.num_rows * columns < kValuesWorthAThread)
                product.quantise(rows.values, columns, num_rows, columns, kernels, 0, 1);
            else
                team.all([&](int thread) { product.quantise(rows.values, columns, num_rows, columns, kernels, thread, team.num_threads); }, [] {});
            has_rows_ = true, name_ = rows.name;
        }
        product.restart(0);
        const FloatRows floats{num_rows, size_t(columns), rows.values};
        team.all([&](int thread) { product.multiply(matrix, floats, 0, out, size_t(matrix.num_rows), kernels, nullptr, thread, team.num_threads); }, [] {});
        for (int64_t i = 0; i < rows.num_rows && rows.bias != nullptr; ++i)
            for (int j = 0; j < matrix.num_rows; ++j) out[i * matrix.num_rows + j] += rows.bias[j];
        ++num_nodes;
    }

private:
    int64_t name_ = 0;
    bool has_rows_ = false;  // whether `product` has the rows of that name in 8 bits
};

OnnxProducts* onnx_products_of(int64_t number) { return OnnxProducts::find(number); }

const PackedMatrix* matrix_of(const OnnxProducts& products, int64_t place) {
    return place >= 0 && place < int64_t(products.matrices.size()) ? &products.matrices[place] : nullptr;
}

int threads_that_pay(const OnnxProducts& products, int64_t place, int64_t num_rows) {
    const PackedMatrix& matrix = products.matrices[place];
    return num_rows * matrix.num_rows * matrix.num_columns < kProductsWorthAThread ? 1 : products.num_threads;
}

const char* multiply_rows(OnnxProducts& products, int64_t place, const ProductRows& rows, float* out, Team& team) {
    const PackedMatrix& matrix = products.matrices[place];
    if (rows.num_rows > INT32_MAX || !products.product.has_room(int(rows.num_rows), matrix.num_columns)) return "lowtide: a product has more rows than its pass";
    products.multiply(matrix, rows, out, team);
    return nullptr;
}

void read_matrix_rows(OnnxProducts& products, int64_t place, const int64_t* ids, int64_t num_ids, float* out) {
    const PackedMatrix& matrix = products.matrices[place];
    for (int64_t i = 0; i < num_ids; ++i, out += matrix.num_columns) {
        if (ids[i] >= 0 && ids[i] < matrix.num_rows)
            unpack_row(matrix, int(ids[i]), out);
        else
            std::fill(out, out + matrix.num_columns, 0.0f);
    }
    ++products.num_nodes;
}

extern "C" OnnxProducts* lowtide_onnx_products_new(const PackedMatrix* matrices, int num_matrices, int max_rows, int num_threads) {
    const ProductKernels* kernels = find_product_kernels(nullptr);
    if (kernels == nullptr || num_matrices < 1 || max_rows < 1 || num_threads < 1) return nullptr;
    int most_columns = 0;
    for (const PackedMatrix* matrix = matrices; matrix != matrices + num_matrices; ++matrix) {
        if (matrix->panels == nullptr || lowtide_packed_bytes(matrix->format, matrix->num_rows, matrix->num_columns) == 0) return nullptr;
        most_columns = std::max(most_columns, matrix->num_columns);
    }
    OnnxProducts* made = nullptr;
    try {
        made = new OnnxProducts(*kernels, matrices, num_matrices, num_threads);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
    if (made->product.reserve(max_rows, most_columns, num_threads)) return made;
    delete made;
    return nullptr;
}

extern "C" void lowtide_onnx_products_free(OnnxProducts* products) { delete products; }

extern "C" int64_t lowtide_onnx_products_number(const OnnxProducts* products) { return products->number; }

extern "C" void lowtide_onnx_products_begin(OnnxProducts* products) { products->begin(); }

extern "C" OnnxProductCounts lowtide_onnx_products_counts(const OnnxProducts* products) {
    return {products->num_nodes, int64_t(products->product.scratch_bytes())};
}

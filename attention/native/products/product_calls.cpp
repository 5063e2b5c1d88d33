#include "product_calls.h"

#include <thread>
#include <vector>

#include "pack.h"
#include "product.h"
#include "unpack.h"

namespace {

bool is_sound(const PackedMatrix& matrix) {
    return matrix.panels != nullptr && lowtide_packed_bytes(matrix.format, matrix.num_rows, matrix.num_columns) != 0;
}

bool is_like(const PackedMatrix& a, const PackedMatrix& b) {
    return a.format == b.format && a.num_rows == b.num_rows && a.num_columns == b.num_columns;
}

}  // namespace

int lowtide_multiply(const PackedMatrix* matrices, int num_matrices, const float* rows, int num_rows, float* out,
                     const char* kernels, int num_threads) {
    if (num_matrices < 1 || num_rows < 1 || num_threads < 1) return 2;
    const PackedMatrix& first = matrices[0];
    for (int i = 0; i < num_matrices; ++i)
        if (!is_sound(matrices[i]) || !is_like(matrices[i], first)) return 2;
    const ProductKernels* found = find_product_kernels(kernels);
    Product product;
    if (found == nullptr || !product.reserve(num_rows, first.num_columns, num_threads)) return 1;
    const size_t of_one = size_t(num_rows) * size_t(first.num_rows);
    const auto work = [&](int thread) {
        for (int i = 0; i < num_matrices; ++i)
            product.run(matrices[i], rows, size_t(first.num_columns), num_rows, 0, out + size_t(i) * of_one,
                        size_t(first.num_rows), *found, nullptr, thread, num_threads);
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < num_threads; ++thread) others.emplace_back(work, thread);
    work(0);
    for (std::thread& other : others) other.join();
    return 0;
}

int lowtide_unpack_row(const PackedMatrix* matrix, int row, float* out) {
    if (!is_sound(*matrix) || row < 0 || row >= matrix->num_rows) return 2;
    unpack_row(*matrix, row, out);
    return 0;
}

int lowtide_has_products(const char* kernels) { return find_product_kernels(kernels) != nullptr; }

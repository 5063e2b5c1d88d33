#include "product_calls.h"

#include <thread>
#include <vector>

#include "pack.h"
#include "product.h"

int lowtide_multiply(const PackedMatrix* matrix, const float* rows, int num_rows, float* out, const char* kernels, int num_threads,
                     int num_rounds) {
    if (lowtide_packed_bytes(matrix->format, matrix->num_rows, matrix->num_columns) == 0 || num_rows < 1 || num_threads < 1) return 2;
    const ProductKernels* found = find_product_kernels(kernels);
    Product product;
    if (found == nullptr || !product.reserve(num_rows, matrix->num_columns, num_threads)) return 1;
    const auto work = [&](int thread) {
        for (int round = 0; round < num_rounds; ++round)
            product.run(*matrix, rows, size_t(matrix->num_columns), num_rows, false, out, size_t(matrix->num_rows), *found, thread,
                        num_threads);
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < num_threads; ++thread) others.emplace_back(work, thread);
    work(0);
    for (std::thread& other : others) other.join();
    return 0;
}

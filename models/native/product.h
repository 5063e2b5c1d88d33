#pragma once

#include <atomic>
#include <vector>

#include "barrier.h"
#include "products.h"

// Rows of float32 times packed matrices, shared out between threads. Results do not depend on their number.
class Product {
public:
    // Makes room for the rows of a product on `num_threads` threads, before any of them runs; false where there
    // is no memory for it.
    bool reserve(int num_rows, int num_columns, int num_threads);

    // Called by each of `num_threads` threads with its own `thread`. `are_quantised` where these very rows were
    // those of the product before. Strides are in floats. Threads beyond those reserved for only wait.
    void run(const PackedMatrix& matrix, const float* rows, size_t row_stride, int num_rows, bool are_quantised, float* out,
             size_t out_stride, const ProductKernels& kernels, int thread, int num_threads);

    size_t scratch_bytes() const { return memory_.size(); }

private:
    std::vector<uint8_t> memory_;
    int reserved_threads_ = 0;
    std::atomic<int> next_panel_{0};
    Barrier barrier_;
};

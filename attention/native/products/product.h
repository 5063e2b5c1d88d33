#pragma once

#include <atomic>
#include <vector>

#include "barrier.h"
#include "products.h"

// Told of panels that a product has read and will not read again, by any of its threads.
struct PanelReader {
    void (*leave)(const void* context, const uint8_t* begin, const uint8_t* end);
    const void* context;
};

// Rows of float32 times packed matrices, shared out between threads. Results do not depend on their number.
class Product {
public:
    static constexpr int kUses = 4;

    // Makes room for the rows of products on `num_threads` threads, while none of them runs; rows that were quantised
    // before are lost. False where there is no memory for it.
    bool reserve(int num_rows, int num_columns, int num_threads);

    // Whether there is room for such a product.
    bool has_room(int num_rows, int num_columns) const { return quantised_bytes(num_rows, num_columns) <= scratch_bytes(); }

    // Called by each of `num_threads` threads with its own `thread`. `use` is 0 where rows are new; products of the
    // same rows that follow count up to kUses - 1, and wait for nobody: all by weights that are quantised, or none. Strides are in floats. `reader` may be null; with one, panels are read in slices.
    // Threads beyond those reserved for only wait.
    void run(const PackedMatrix& matrix, const float* rows, size_t row_stride, int num_rows, int use, float* out,
             size_t out_stride, const ProductKernels& kernels, const PanelReader* reader, int thread, int num_threads);

    // The two halves of `run`, for threads that cannot wait for one another: every thread's part of `quantise` is done
    // before any part of `multiply`, and `restart` is called once before each product's. Of weights that are not
    // quantised nothing is to be done before.
    void quantise(const float* rows, size_t row_stride, int num_rows, int num_columns, const ProductKernels& kernels, int thread, int num_threads);
    void restart(int use) { next_panels_[use] = 0; }
    void multiply(const PackedMatrix& matrix, const FloatRows& rows, int use, float* out, size_t out_stride, const ProductKernels& kernels,
                  const PanelReader* reader, int thread, int num_threads);

    size_t scratch_bytes() const { return memory_.size() * sizeof(Line); }

private:
    int workers_of(int num_threads) const { return num_threads < reserved_threads_ ? num_threads : reserved_threads_; }

    struct alignas(64) Line {
        uint8_t bytes[64];
    };

    std::vector<Line> memory_;
    int reserved_threads_ = 0;
    std::atomic<int> next_panels_[kUses] = {};
    Barrier barrier_;
};

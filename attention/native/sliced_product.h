#pragma once

#include <cstdint>
#include <vector>

#include "ggml_tensor.h"
#include "weight_stream.h"

// What of ggml multiplies a row of weights, by address: ggml_get_type_traits_cpu and ggml_row_size.
struct ProductFunctions {
    void* type_traits;
    void* row_size;
};

// The product of a large matrix of weights, such as the output's, and a few rows, computed as ggml does it row by
// row, and each thread gives its part of the matrix back slice by slice: it is never resident as a whole.
class SlicedProduct {
public:
    // The node's operation may be taken over: its shapes and types are as we know them, and there is room. Called
    // before each pass. Throws std::bad_alloc.
    bool can_take(const GgmlTensor* node, const ProductFunctions& ggml, int num_threads);

    // What ggml calls on each of its threads.
    void multiply(GgmlTensor* node, int thread, int num_threads, const WeightStream& weights);

private:
    std::vector<char> rows_;  // in the type that weights are multiplied with, for each thread
    ProductFunctions ggml_{};
    int reserved_threads_ = 0;
};

#pragma once

#include <cstdint>
#include <vector>

#include "custom_ops.h"
#include "ggml_tensor.h"
#include "product.h"

// Weights of llama.cpp's, by where their data lies, and the same packed.
struct PackedWeights {
    const void* data;
    PackedMatrix matrix;
};

// The products of a graph whose weights are packed: each such node becomes a custom operation. Rows that several
// products share, one after another, are quantised once.
class PackedProducts {
public:
    PackedProducts() : kernels_(find_product_kernels(nullptr)) {}

    // The operations that nodes become, for `learn_ops`.
    void want(std::vector<CustomOp>& wanted);

    // `weights` in order of where they lie; they stay as long as this. False, and nothing changes, where they are in
    // another order or of a format that is not known. Throws std::bad_alloc, and nothing changes.
    bool set(const PackedWeights* weights, int num_weights);

    // A pass begins.
    void start() { last_rows_ = nullptr; }

    // Makes the node, a product of llama.cpp's or one that was taken before, ours where it can be. Called in the
    // graph's order, before each pass. Throws nothing: where there is no memory, the node is not ours.
    bool take(GgmlTensor* node, int32_t custom, int num_threads);

    // Whether the node is one that was taken.
    bool is_taken(const GgmlTensor* node) const;

    int64_t num_taken() const { return num_taken_; }
    size_t scratch_bytes() const { return product_.scratch_bytes(); }

private:
    static void multiply(GgmlTensor* node, int thread, int num_threads, void* user_data);
    static void multiply_same(GgmlTensor* node, int thread, int num_threads, void* user_data);
    void run(GgmlTensor* node, bool are_quantised, int thread, int num_threads);
    const PackedMatrix* packed(const GgmlTensor* weights) const;

    const ProductKernels* kernels_;
    std::vector<PackedWeights> weights_;
    Product product_;
    const GgmlTensor* last_rows_ = nullptr;
    int64_t num_taken_ = 0;
    int32_t params_[16], same_params_[16];  // of the operations: rows are quantised, or were by the product before
};

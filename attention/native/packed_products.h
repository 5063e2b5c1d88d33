#pragma once

#include <cstdint>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "custom_ops.h"
#include "ggml_tensor.h"
#include "product.h"
#include "weight_stream.h"

// The products of a graph whose weights are packed, and the rows that are read of such weights: each such node
// becomes a custom operation. Rows that several products share, one after another, are quantised once.
class PackedProducts {
public:
    explicit PackedProducts(const WeightStream& stream) : kernels_(find_product_kernels(nullptr)), stream_(stream) {}

    // The operations that nodes become, for `learn_ops`.
    void want(std::vector<CustomOp>& wanted);

    // Tensors of these names, one a line, are packed; their products have `max_rows` rows of `max_columns` at most.
    // False, and nothing changes, where there is no memory. Throws std::bad_alloc, and nothing changes.
    bool set(std::string_view names, int max_rows, int max_columns, int num_threads);

    // Asked about every node in the graph's order, before each pass: makes it ours where it reads packed weights.
    void take(GgmlTensor* node, const OpNumbers& ops);

    int64_t num_taken() const { return num_taken_; }

    // Nodes that read packed weights in a way that is not known: what the graph computes is wrong.
    int64_t num_refused() const { return num_refused_; }

    size_t scratch_bytes() const { return product_.scratch_bytes(); }

private:
    struct Operation {
        PackedProducts* owner;
        int use;
        bool is_sliced;
        int32_t params[16];
    };

    static void multiply(GgmlTensor* node, int thread, int num_threads, void* user_data);
    static void read_rows(GgmlTensor* node, int thread, int num_threads, void* user_data);
    bool is_packed(const GgmlTensor* source) const;
    bool is_known_product(const GgmlTensor* node) const;
    void become(GgmlTensor* node, int32_t custom, const Operation& operation);

    const ProductKernels* kernels_;
    const WeightStream& stream_;
    std::vector<char> text_;  // of the names
    std::unordered_set<std::string_view> names_;
    Product product_;
    Operation operations_[2 * Product::kUses], rows_{};
    const GgmlTensor* quantised_ = nullptr;  // whose rows the product holds; its graph may be freed: it is compared alone
    const void* quantised_data_ = nullptr;
    bool by_floats_ = false;                 // whether those products' weights are not quantised, nor the rows then
    int num_uses_ = 0;                       // products that have taken them
    int64_t num_taken_ = 0, num_refused_ = 0;
};

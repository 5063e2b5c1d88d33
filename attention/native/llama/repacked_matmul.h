#pragma once

// Matmuls with repacked weights in llama.cpp's graph.

#include <cstdint>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "llama/ggml_abi.h"
#include "llama/weight_streaming.h"
#include "matmul/matmul.h"

// The matmuls and row lookups of a graph with repacked weights: each such node becomes a custom operation.
// Activations that several matmuls share, one after another, are quantised once.
class RepackedMatmul {
public:
    RepackedMatmul(const WeightStream& stream, Team& team)
        : kernels_(find_matmul_kernels(nullptr)), stream_(stream), team_(team) {}

    // Lists the custom operations, for `read_ggml_abi`.
    void list_ops(std::vector<CustomOp>& ops);

    // Declares the tensors of these names, one per line, as repacked. Their matmuls have at most `max_rows` rows and
    // `max_columns` columns. Returns false if there is no memory, or throws std::bad_alloc; either way nothing
    // changes.
    bool set(std::string_view names, int max_rows, int max_columns, int num_threads);

    // Called for every node in the graph's order before each forward pass. Replaces it if it reads repacked weights.
    void replace(GgmlTensor* node, const GgmlOps& ops);

    int64_t num_replaced() const { return num_replaced_; }

    // Nodes that read repacked weights in an unknown way: the graph's result is wrong.
    int64_t num_refused() const { return num_refused_; }

    size_t scratch_bytes() const { return matmul_.scratch_bytes(); }

private:
    struct Operation {
        RepackedMatmul* owner;
        int reuse;
        bool is_streamed;
        int32_t params[16];
    };

    static void multiply(GgmlTensor* node, int thread, int num_threads, void* user_data);
    static void get_rows(GgmlTensor* node, int thread, int num_threads, void* user_data);
    bool is_repacked(const GgmlTensor* source) const;
    bool is_known_matmul(const GgmlTensor* node) const;
    void turn_into(GgmlTensor* node, int32_t custom, const Operation& operation);

    const MatmulKernels* kernels_;
    const WeightStream& stream_;
    Team& team_;  // computes where ggml's only thread does
    std::vector<char> text_;  // the characters of the names
    std::unordered_set<std::string_view> names_;
    Matmul matmul_;
    Operation operations_[2 * Matmul::kMaxReuses], get_rows_{};
    // The activations that are quantised now; only compared, since their graph may be freed.
    const GgmlTensor* quantised_ = nullptr;
    const void* quantised_data_ = nullptr;
    bool is_float_ = false;  // whether the weights of those matmuls are F16 or BF16, so that nothing is quantised
    int num_reuses_ = 0;     // matmuls that used these activations so far
    int64_t num_replaced_ = 0, num_refused_ = 0;
};

#pragma once

// Matmuls with repacked weights in llama.cpp's graph.

#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "llama/ggml_abi.h"
#include "llama/weights/moved_results.h"
#include "llama/weights/pass_reads.h"
#include "llama/weights/weight_streaming.h"
#include "matmul/matmul.h"

// The matmuls and row lookups of a graph with repacked weights: each such node becomes a custom operation. Matmuls of the
// same activations, such as those of Q, K and V, are computed together where the first of them stands; the others become
// empty nodes.
class RepackedMatmul {
public:
    RepackedMatmul(const WeightStream& stream, PassReads& reads, Team& team)
        : kernels_(find_matmul_kernels(nullptr)), stream_(stream), reads_(reads), team_(team) {}

    // Lists the custom operations, for `read_ggml_abi`.
    void list_ops(std::vector<CustomOp>& ops);

    // Declares the tensors of these names, one per line, as repacked. Their matmuls have at most `max_rows` rows and
    // `max_columns` columns. Returns false if there is no memory, or throws std::bad_alloc; either way nothing
    // changes.
    bool set(std::string_view names, int max_rows, int max_columns, int num_threads);

    // Called for every node in the graph's order before each forward pass. Replaces it if it reads repacked weights.
    // `begins_part`: nodes were computed since the last call.
    void replace(GgmlTensor* node, const GgmlOps& ops, bool begins_part);

    int64_t num_replaced() const { return num_replaced_; }

    // In how many steps of all threads the matmuls among these are computed.
    int64_t num_steps() const { return num_steps_; }

    // Nodes that read repacked weights in an unknown way: the graph's result is wrong.
    int64_t num_refused() const { return num_refused_; }

    size_t scratch_bytes() const { return matmul_.scratch_bytes() + moved_.num_bytes(); }

private:
    struct Operation {
        RepackedMatmul* owner;
        bool is_streamed;
        int32_t params[16];
    };

    // Matmuls that are computed together.
    struct Group {
        GgmlTensor* nodes[Matmul::kMaxTargets];
        int count, next_read;
    };

    static void multiply(GgmlTensor* node, int thread, int num_threads, void* user_data);
    static void get_rows(GgmlTensor* node, int thread, int num_threads, void* user_data);
    bool is_repacked(const GgmlTensor* source);
    bool is_known_matmul(const GgmlTensor* node) const;
    bool can_join(const GgmlTensor* node) const;
    bool replaces_used(const Extent& result) const;
    void replace_matmul(GgmlTensor* node, const GgmlOps& ops);
    void turn_into(GgmlTensor* node, int32_t custom, const Operation& operation);

    const MatmulKernels* kernels_;
    const WeightStream& stream_;
    PassReads& reads_;
    Team& team_;  // computes where ggml's only thread does
    std::vector<char> text_;  // the characters of the names
    std::unordered_set<std::string_view> names_;
    std::unordered_map<const GgmlTensor*, bool> known_;  // inputs of graphs: whether they have one of these names
    Matmul matmul_;
    Operation operations_[2], get_rows_{};
    std::vector<Group> groups_;  // of the part of the graph that is computed next
    bool is_open_ = false;         // whether the last group may get another node
    std::vector<Extent> touched_;  // what the nodes behind the first of the last group read or write
    MovedResults moved_;
    int64_t num_replaced_ = 0, num_steps_ = 0, num_refused_ = 0;
};

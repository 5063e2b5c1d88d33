#pragma once

// Weight streaming: releases memory-mapped weights as a graph advances, so that a model needs less memory than its
// weights.

#include <cstdint>
#include <vector>

#include "llama/ggml_abi.h"

// Weights of one group at [begin, end). Releasing them releases the pages [page_begin, page_end).
struct WeightSpan {
    const char *begin, *end;
    char *page_begin, *page_end;
    int32_t group;
};

// When a node first reads another group (a layer, or one tensor outside of the layers), the pages of all other groups
// are released, except for those that stay resident. The mapping is read-only and backed by a file: a released page
// is read again when it is needed.
class WeightStream {
public:
    // `spans` in order of address; one flag per group says whether it stays resident. Returns false if a span has an
    // unknown group or they are not in order, or throws std::bad_alloc; either way nothing changes.
    bool set(const WeightSpan* spans, int num_spans, const uint8_t* keep_resident, int num_groups);

    // Whether the node reads another group than the nodes before it. Called in the graph's order.
    bool enters_group(const GgmlTensor* node);

    // After such a node was computed: releases the groups that it does not read.
    void release_others(const GgmlTensor* node);

    // Whether the tensor is a weight outside of the layers, alone in its group, that does not stay resident.
    bool is_streamed_alone(const GgmlTensor* weight) const;

    // Releases a part of one weight, from the pages around `begin` to those around `end`, which are read next. Any
    // thread may call it.
    void release_pages(const char* begin, const char* end) const;

    int64_t freed_bytes() const { return freed_bytes_; }

private:
    const WeightSpan* span_of(const char* data) const;
    bool reads(const GgmlTensor* node, int group) const;
    int group_of(const GgmlTensor* source) const;
    void release_pages(int group);

    std::vector<WeightSpan> spans_;
    std::vector<uint8_t> keep_resident_, is_resident_;
    int current_ = -1;
    int64_t freed_bytes_ = 0;
};

// The matmul of a large matrix, such as the output matrix, with a few rows. It computes what ggml does, row by row,
// and each thread releases its part of the matrix slice by slice, so the matrix is never resident as a whole.
class StreamedMatmul {
public:
    // Whether the node can be replaced: shapes and types are supported and there is room. Called before each forward
    // pass. Throws std::bad_alloc.
    bool can_replace(const GgmlTensor* node, const GgmlMatmulFunctions& ggml, int num_threads);

    // ggml calls this on each of its threads.
    void multiply(GgmlTensor* node, int thread, int num_threads, const WeightStream& weights);

private:
    std::vector<char> converted_;  // the rows in the type that weights are multiplied with, for each thread
    GgmlMatmulFunctions ggml_{};
    int reserved_threads_ = 0;
};

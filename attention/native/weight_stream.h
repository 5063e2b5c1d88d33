#pragma once

#include <cstdint>
#include <vector>

#include "ggml_tensor.h"

// Weights of one group at [begin, end); giving them back takes the pages of [page_begin, page_end) with them.
struct WeightSpan {
    const char *begin, *end;
    char *page_begin, *page_end;
    int32_t group;
};

// Gives memory-mapped weights back while a graph runs: when a node first reads another group (a layer, or one
// tensor outside of the layers), the pages of all others go, but for those that are kept. The mapping is of a
// file and read only, so a page that was given back is read again when it is wanted.
class WeightStream {
public:
    // `spans` in order of their addresses; one flag a group says whether it is kept. False, and nothing changes, where
    // a span is of no such group or they are not in order. Throws std::bad_alloc, and nothing changes.
    bool set(const WeightSpan* spans, int num_spans, const uint8_t* kept, int num_groups);

    // Whether the node reads another group than the nodes before it: asked in the graph's order.
    bool enters_group(const GgmlTensor* node);

    // Once such a node is computed: gives back what it does not read.
    void leave_others(const GgmlTensor* node);

    // Whether the tensor is a weight that is not kept and lies outside of the layers, alone in its group.
    bool is_streamed_alone(const GgmlTensor* weight) const;

    // Gives a part of one weight back, from the pages around its begin up to those around its end, which are
    // about to be read; any thread may.
    void give_back(const char* begin, const char* end) const;

    int64_t given_back_bytes() const { return given_back_bytes_; }

private:
    const WeightSpan* span_of(const char* data) const;
    bool reads(const GgmlTensor* node, int group) const;
    int group_of(const GgmlTensor* source) const;
    void give_back(int group);

    std::vector<WeightSpan> spans_;
    std::vector<uint8_t> kept_, resident_;
    int current_ = -1;
    int64_t given_back_bytes_ = 0;
};

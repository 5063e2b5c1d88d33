#pragma once

#include <cstddef>

#include "attention_problem.h"
#include "ggml_tensor.h"

// One of llama.cpp's attention nodes, read into the problem that our kernels solve; one for each stream of
// the cache. Scale and soft-cap are the caller's to fill: they stand where a custom operation has its own.
class AttentionNode {
public:
    // False where anything is not as the kernels know it.
    bool read(const GgmlTensor* node);

    int num_streams() const { return num_streams_; }
    AttentionProblem problem(int stream) const;

    // The layer whose cache the node reads; -1 where it has no name that tells.
    static int layer_of(const GgmlTensor* node);

private:
    AttentionProblem first_{};
    int num_streams_ = 0;
    size_t q_stride_ = 0, k_stride_ = 0, v_stride_ = 0, mask_stride_ = 0, out_stride_ = 0;
};

constexpr int kMaxLayers = 512;

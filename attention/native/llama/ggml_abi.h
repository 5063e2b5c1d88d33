#pragma once

// The parts of ggml's binary interface that lowtide uses, declared here so that building lowtide needs no headers of
// llama.cpp. `read_ggml_abi` checks them against the loaded library before use.

#include <cstddef>
#include <cstdint>

#include "attention/problem.h"

// ggml_tensor.
struct GgmlTensor {
    int32_t type;
    void* buffer;
    int64_t ne[4];  // elements
    size_t nb[4];   // strides in bytes
    int32_t op;
    int32_t op_params[16];
    int32_t flags;
    GgmlTensor* src[10];
    GgmlTensor* view_src;
    size_t view_offs;
    void* data;
    char name[64];
    void* extra;
    char padding[8];
};

constexpr int32_t kGgmlTypeF32 = 0;
constexpr int32_t kGgmlTypeF16 = 1;
constexpr int32_t kGgmlTypeQ4_0 = 2;
constexpr int32_t kGgmlTypeQ8_0 = 8;
constexpr int32_t kGgmlTypeI32 = 26;

// Functions that multiply a row of weights, by address.
struct GgmlMatmulFunctions {
    void* type_traits;
    void* row_size;
};

// Functions of ggml, by address: Python loads the library and nothing links it.
struct GgmlFunctions {
    void* init;           // ggml_init
    void* free;           // ggml_free
    void* new_tensor_4d;  // ggml_new_tensor_4d
    void* view_tensor;    // ggml_view_tensor
    void* custom_4d;      // ggml_custom_4d
    void* set_name;       // ggml_set_name
    void* op_name;        // ggml_op_name
    GgmlMatmulFunctions matmul;
    void* is_host;  // ggml_backend_buffer_is_host
};

// The numbers of ggml's operations.
struct GgmlOps {
    int32_t flash_attn, mul_mat, get_rows, custom;
};

// A function that ggml runs on each of its threads as a custom operation. `op_params` receives what such a node has
// in its `op_params`.
struct CustomOp {
    void (*function)(GgmlTensor* node, int thread, int num_threads, void* user_data);
    void* user_data;
    int32_t* op_params;  // 16 of them
};

// Checks GgmlTensor against tensors that the library makes, and reads the parameters of custom operations from it.
// Returns an error message, or null. Throws std::bad_alloc.
const char* read_ggml_abi(const GgmlFunctions& ggml, GgmlOps& ops, const CustomOp* custom_ops, int num_custom_ops);

// An attention node of llama.cpp (FLASH_ATTN_EXT) as a problem of the kernels, one for each stream of the cache. The
// caller fills in scale and softcap: a custom operation has its own parameters in their place.
class AttentionNode {
public:
    // Returns false if the node has a shape or a type that the kernels do not support.
    bool read(const GgmlTensor* node);

    int num_streams() const { return num_streams_; }
    AttentionProblem problem(int stream) const;

    // The layer whose cache the node reads; -1 if its name does not tell.
    static int layer_of(const GgmlTensor* node);

private:
    AttentionProblem first_{};
    int num_streams_ = 0;
    size_t q_stride_ = 0, k_stride_ = 0, v_stride_ = 0, mask_stride_ = 0, out_stride_ = 0;
};

constexpr int kMaxLayers = 512;

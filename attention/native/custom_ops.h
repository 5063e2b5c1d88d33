#pragma once

#include <cstdint>

#include "ggml_tensor.h"
#include "sliced_product.h"

// What of ggml is called, by address: the library is loaded by Python and never linked.
struct GgmlFunctions {
    void* init;           // ggml_init
    void* free;           // ggml_free
    void* new_tensor_4d;  // ggml_new_tensor_4d
    void* view_tensor;    // ggml_view_tensor
    void* custom_4d;      // ggml_custom_4d
    void* set_name;       // ggml_set_name
    void* op_name;        // ggml_op_name
    ProductFunctions product;
    void* is_host;  // ggml_backend_buffer_is_host
};

// ggml's numbers of the operations that we know.
struct OpNumbers {
    int32_t flash_attention, product, rows, custom;
};

// A function that a node shall run on each of ggml's threads, and where what its `op_params` must be goes.
struct CustomOp {
    void (*function)(GgmlTensor* node, int thread, int num_threads, void* user_data);
    void* user_data;
    int32_t* op_params;  // 16 of them
};

// Holds our declaration of ggml's tensor against tensors that the library makes, and takes the parameters of
// custom operations from it. Returns what is wrong, or null. Throws std::bad_alloc.
const char* learn_ops(const GgmlFunctions& ggml, OpNumbers& numbers, const CustomOp* wanted, int num_wanted);

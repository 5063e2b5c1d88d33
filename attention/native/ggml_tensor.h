#pragma once

#include <cstddef>
#include <cstdint>

// The one struct of ggml that is read, declared here so that building lowtide needs no headers of
// llama.cpp. `graph_hook.cpp` holds it against tensors made through the library before it is used.
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

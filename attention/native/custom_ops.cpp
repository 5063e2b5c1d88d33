#include "custom_ops.h"

#include <cstring>
#include <memory>
#include <vector>

namespace {

constexpr int kEveryThread = -1;  // GGML_N_TASKS_MAX
constexpr int kMaxOps = 512;

struct InitParams {
    size_t mem_size;
    void* mem_buffer;
    bool no_alloc;
};

using Function = void (*)(GgmlTensor*, int, int, void*);
using Init = void* (*)(InitParams);
using Free = void (*)(void*);
using NewTensor4d = GgmlTensor* (*)(void*, int32_t, int64_t, int64_t, int64_t, int64_t);
using ViewTensor = GgmlTensor* (*)(void*, GgmlTensor*);
using Custom4d = GgmlTensor* (*)(void*, int32_t, int64_t, int64_t, int64_t, int64_t, GgmlTensor**, int, Function, int, void*);
using SetName = GgmlTensor* (*)(GgmlTensor*, const char*);
using OpName = const char* (*)(int32_t);

bool same_layout(const GgmlTensor* t, const GgmlTensor* view, const char* name) {
    return t->type == kGgmlTypeF16 && t->ne[0] == 64 && t->ne[1] == 3 && t->ne[2] == 5 && t->ne[3] == 7 && t->nb[0] == 2 &&
           t->nb[1] == 128 && t->nb[2] == 384 && t->nb[3] == 1920 && std::strcmp(t->name, name) == 0 &&
           t->view_src == nullptr && view->view_src == t && view->view_offs == 0 && view->ne[3] == 7;
}

int32_t number_of(const char* name, OpName op_name) {
    for (int32_t i = 0; i < kMaxOps; ++i)
        if (std::strcmp(op_name(i), name) == 0) return i;
    return -1;
}

}  // namespace

const char* learn_ops(const GgmlFunctions& ggml, OpNumbers& numbers, const CustomOp* wanted, int num_wanted) {
    std::vector<char> memory(1 << 20);
    void* context = reinterpret_cast<Init>(ggml.init)({memory.size(), memory.data(), true});
    if (context == nullptr) return "ggml makes no context";
    const std::unique_ptr<void, Free> keeper(context, reinterpret_cast<Free>(ggml.free));

    const char* const name = "lowtide layout check";
    GgmlTensor* tensor = reinterpret_cast<NewTensor4d>(ggml.new_tensor_4d)(context, kGgmlTypeF16, 64, 3, 5, 7);
    reinterpret_cast<SetName>(ggml.set_name)(tensor, name);
    const GgmlTensor* view = reinterpret_cast<ViewTensor>(ggml.view_tensor)(context, tensor);
    if (!same_layout(tensor, view, name)) return "ggml's tensors are laid out in another way";

    const auto op_name = reinterpret_cast<OpName>(ggml.op_name);
    numbers.flash_attention = number_of("FLASH_ATTN_EXT", op_name), numbers.product = number_of("MUL_MAT", op_name);
    numbers.rows = number_of("GET_ROWS", op_name);
    if (numbers.flash_attention < 0 || numbers.product < 0 || numbers.rows < 0)
        return "ggml has no FLASH_ATTN_EXT, no MUL_MAT or no GET_ROWS";

    const auto custom_4d = reinterpret_cast<Custom4d>(ggml.custom_4d);
    GgmlTensor* sources[1] = {tensor};
    for (const CustomOp* op = wanted; op != wanted + num_wanted; ++op) {
        const GgmlTensor* custom = custom_4d(context, kGgmlTypeF32, 1, 1, 1, 1, sources, 1, op->function, kEveryThread, op->user_data);
        if (custom->src[0] != tensor || std::strcmp(op_name(custom->op), "CUSTOM") != 0)
            return "ggml's custom operations are laid out in another way";
        numbers.custom = custom->op;
        std::memcpy(op->op_params, custom->op_params, sizeof custom->op_params);
    }
    return nullptr;
}

// Checks ggml's binary interface against the loaded library, and reads its nodes.

#include "llama/ggml_abi.h"

#include <cstdio>
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

int32_t find_op(const char* name, OpName op_name) {
    for (int32_t i = 0; i < kMaxOps; ++i)
        if (std::strcmp(op_name(i), name) == 0) return i;
    return -1;
}

}  // namespace

const char* read_ggml_abi(const GgmlFunctions& ggml, GgmlOps& ops, const CustomOp* custom_ops, int num_custom_ops) {
    std::vector<char> memory(1 << 20);
    void* context = reinterpret_cast<Init>(ggml.init)({memory.size(), memory.data(), true});
    if (context == nullptr) return "ggml_init failed";
    const std::unique_ptr<void, Free> context_owner(context, reinterpret_cast<Free>(ggml.free));

    const char* const name = "lowtide layout check";
    GgmlTensor* tensor = reinterpret_cast<NewTensor4d>(ggml.new_tensor_4d)(context, kGgmlTypeF16, 64, 3, 5, 7);
    reinterpret_cast<SetName>(ggml.set_name)(tensor, name);
    const GgmlTensor* view = reinterpret_cast<ViewTensor>(ggml.view_tensor)(context, tensor);
    if (!same_layout(tensor, view, name)) return "ggml_tensor has another layout";

    const auto op_name = reinterpret_cast<OpName>(ggml.op_name);
    ops.flash_attn = find_op("FLASH_ATTN_EXT", op_name), ops.mul_mat = find_op("MUL_MAT", op_name);
    ops.get_rows = find_op("GET_ROWS", op_name);
    if (ops.flash_attn < 0 || ops.mul_mat < 0 || ops.get_rows < 0)
        return "ggml lacks FLASH_ATTN_EXT, MUL_MAT or GET_ROWS";

    const auto custom_4d = reinterpret_cast<Custom4d>(ggml.custom_4d);
    GgmlTensor* sources[1] = {tensor};
    for (const CustomOp* op = custom_ops; op != custom_ops + num_custom_ops; ++op) {
        const GgmlTensor* custom = custom_4d(context, kGgmlTypeF32, 1, 1, 1, 1, sources, 1, op->function, kEveryThread, op->user_data);
        if (custom->src[0] != tensor || std::strcmp(op_name(custom->op), "CUSTOM") != 0)
            return "ggml's custom operations have another layout";
        ops.custom = custom->op;
        std::memcpy(op->op_params, custom->op_params, sizeof custom->op_params);
    }
    return nullptr;
}

namespace {

bool kv_type_of(const GgmlTensor* t, int64_t size, KvType& type) {
    switch (t->type) {
        case kGgmlTypeF16: type = KvType::f16; return t->nb[0] == 2;
        case kGgmlTypeQ8_0: type = KvType::q8_0; return size % 32 == 0;
        case kGgmlTypeQ4_0: type = KvType::q4_0; return size % 32 == 0;
        default: return false;
    }
}

bool is_known_head_dim(int64_t size) { return size > 0 && size <= kMaxHeadDim && size % 16 == 0; }

}  // namespace

int AttentionNode::layer_of(const GgmlTensor* node) {
    const GgmlTensor* k = node->src[1];
    if (k == nullptr) return -1;
    while (k->view_src != nullptr) k = k->view_src;
    int layer = -1;
    if (std::sscanf(k->name, "cache_k_l%d", &layer) != 1 || layer < 0 || layer >= kMaxLayers) return -1;
    return layer;
}

bool AttentionNode::read(const GgmlTensor* node) {
    const GgmlTensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3], *sinks = node->src[4];
    if (q == nullptr || k == nullptr || v == nullptr || mask == nullptr) return false;
    const int64_t key_dim = q->ne[0], value_dim = v->ne[0], tokens = q->ne[1], heads = q->ne[2], streams = q->ne[3];
    const int64_t keys = k->ne[1], kv_heads = k->ne[2];
    const bool shapes = tokens > 0 && keys > 0 && k->ne[0] == key_dim && v->ne[1] == keys && v->ne[2] == kv_heads && kv_heads > 0 &&
                        heads % kv_heads == 0 && is_known_head_dim(key_dim) && is_known_head_dim(value_dim) &&
                        mask->ne[0] >= keys && mask->ne[1] >= tokens && mask->ne[2] == 1 && node->ne[0] == value_dim &&
                        node->ne[1] == heads && node->ne[2] == tokens;
    const bool stream_shapes = streams > 0 && k->ne[3] == streams && v->ne[3] == streams && node->ne[3] == streams &&
                               (mask->ne[3] == streams || mask->ne[3] == 1);
    AttentionProblem& p = first_;
    const bool types = q->type == kGgmlTypeF32 && q->nb[0] == 4 && mask->type == kGgmlTypeF16 && mask->nb[0] == 2 &&
                       node->type == kGgmlTypeF32 && node->nb[0] == 4 && kv_type_of(k, key_dim, p.k_type) &&
                       kv_type_of(v, value_dim, p.v_type);
    const bool known_sinks = sinks == nullptr || (sinks->type == kGgmlTypeF32 && sinks->nb[0] == 4 && sinks->ne[0] == heads);
    if (!shapes || !stream_shapes || !types || !known_sinks) return false;
    p.q = static_cast<const char*>(q->data), p.q_token_stride = q->nb[1], p.q_head_stride = q->nb[2];
    p.k = static_cast<const char*>(k->data), p.k_key_stride = k->nb[1], p.k_head_stride = k->nb[2];
    p.v = static_cast<const char*>(v->data), p.v_key_stride = v->nb[1], p.v_head_stride = v->nb[2];
    p.mask = static_cast<const char*>(mask->data), p.mask_token_stride = mask->nb[1];
    p.out = static_cast<char*>(node->data), p.out_token_stride = node->nb[2], p.out_head_stride = node->nb[1];
    p.num_tokens = int(tokens), p.num_heads = int(heads), p.num_kv_heads = int(kv_heads), p.num_keys = int(keys);
    p.key_dim = int(key_dim), p.value_dim = int(value_dim);
    p.sinks = sinks == nullptr ? nullptr : static_cast<const float*>(sinks->data);
    num_streams_ = int(streams);
    q_stride_ = q->nb[3], k_stride_ = k->nb[3], v_stride_ = v->nb[3], out_stride_ = node->nb[3];
    mask_stride_ = mask->ne[3] == 1 ? 0 : mask->nb[3];
    return true;
}

AttentionProblem AttentionNode::problem(int stream) const {
    AttentionProblem p = first_;
    p.q += stream * q_stride_, p.k += stream * k_stride_, p.v += stream * v_stride_;
    p.mask += stream * mask_stride_, p.out += stream * out_stride_;
    return p;
}

// The evaluation callback: recognises llama.cpp's attention nodes and gives them to our kernel.
//
// With flash attention on, the attention of every architecture is one FLASH_ATTN_EXT node. Before a split
// is computed the scheduler asks about each of its nodes; there the node becomes a custom operation, by
// copying `op` and `op_params` from one that ggml itself made. Answering false keeps the split whole, so
// nothing is copied and nothing runs more often. A node that is not as we know it is left alone and counted.

#include "graph_hook.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "attend.h"
#include "attention_problem.h"
#include "ggml_tensor.h"

namespace {

constexpr int kMaxLayers = 512;
constexpr int kEveryThread = -1;  // GGML_N_TASKS_MAX
constexpr int kMaxOps = 512;

struct InitParams {
    size_t mem_size;
    void* mem_buffer;
    bool no_alloc;
};

using CustomOp = void (*)(GgmlTensor*, int, int, void*);
using Init = void* (*)(InitParams);
using Free = void (*)(void*);
using NewTensor4d = GgmlTensor* (*)(void*, int32_t, int64_t, int64_t, int64_t, int64_t);
using ViewTensor = GgmlTensor* (*)(void*, GgmlTensor*);
using Custom4d = GgmlTensor* (*)(void*, int32_t, int64_t, int64_t, int64_t, int64_t, GgmlTensor**, int, CustomOp, int, void*);
using SetName = GgmlTensor* (*)(GgmlTensor*, const char*);
using OpName = const char* (*)(int32_t);

// What a node says beside its sources, and where its kernel finds everything else.
struct Layer {
    GraphHook* hook;
    float scale, softcap;
    int32_t op_params[16];        // of the custom operation
    int32_t their_op_params[16];  // of the node as llama.cpp made it
    bool ours, theirs;
};

}  // namespace

struct GraphHook {
    const KernelSet* kernels;
    int32_t flash_attention_op, custom_op;
    bool active;
    int num_threads;
    Attend attend;
    Layer layers[kMaxLayers];
    int64_t nodes_ours, nodes_theirs, nanoseconds;
};

namespace {

bool same_layout(const GgmlTensor* t, const GgmlTensor* view, const char* name) {
    return t->type == kGgmlTypeF16 && t->ne[0] == 64 && t->ne[1] == 3 && t->ne[2] == 5 && t->ne[3] == 7 && t->nb[0] == 2 &&
           t->nb[1] == 128 && t->nb[2] == 384 && t->nb[3] == 1920 && std::strcmp(t->name, name) == 0 &&
           t->view_src == nullptr && view->view_src == t && view->view_offs == 0 && view->ne[3] == 7;
}

// Holds the declared struct against tensors that the library makes, and takes the custom operation's
// parameters for each layer from it. Returns what is wrong, or null.
const char* learn(const GgmlFunctions& ggml, GraphHook& hook, CustomOp op) {
    std::vector<char> memory(1 << 20);
    void* context = reinterpret_cast<Init>(ggml.init)({memory.size(), memory.data(), true});
    if (context == nullptr) return "ggml makes no context";
    const std::unique_ptr<void, Free> keeper(context, reinterpret_cast<Free>(ggml.free));

    const char* const name = "lowtide layout check";
    GgmlTensor* tensor = reinterpret_cast<NewTensor4d>(ggml.new_tensor_4d)(context, kGgmlTypeF16, 64, 3, 5, 7);
    reinterpret_cast<SetName>(ggml.set_name)(tensor, name);
    const GgmlTensor* view = reinterpret_cast<ViewTensor>(ggml.view_tensor)(context, tensor);
    if (!same_layout(tensor, view, name)) return "ggml's tensors are laid out in another way";

    hook.flash_attention_op = -1;
    const auto op_name = reinterpret_cast<OpName>(ggml.op_name);
    for (int32_t i = 0; i < kMaxOps && hook.flash_attention_op < 0; ++i)
        if (std::strcmp(op_name(i), "FLASH_ATTN_EXT") == 0) hook.flash_attention_op = i;
    if (hook.flash_attention_op < 0) return "ggml has no FLASH_ATTN_EXT";

    GgmlTensor* sources[1] = {tensor};
    for (int i = 0; i < kMaxLayers; ++i) {
        const GgmlTensor* custom = reinterpret_cast<Custom4d>(ggml.custom_4d)(
            context, kGgmlTypeF32, 1, 1, 1, 1, sources, 1, op, kEveryThread, &hook.layers[i]);
        if (custom->src[0] != tensor || std::strcmp(op_name(custom->op), "CUSTOM") != 0)
            return "ggml's custom operations are laid out in another way";
        hook.custom_op = custom->op;
        std::memcpy(hook.layers[i].op_params, custom->op_params, sizeof hook.layers[i].op_params);
    }
    return nullptr;
}

int layer_of(const GgmlTensor* k) {
    while (k->view_src != nullptr) k = k->view_src;
    int layer = -1;
    if (std::sscanf(k->name, "cache_k_l%d", &layer) != 1 || layer < 0 || layer >= kMaxLayers) return -1;
    return layer;
}

bool kv_type_of(const GgmlTensor* t, int64_t size, KvType& type) {
    switch (t->type) {
        case kGgmlTypeF16: type = KvType::f16; return t->nb[0] == 2;
        case kGgmlTypeQ8_0: type = KvType::q8_0; return size % 32 == 0;
        case kGgmlTypeQ4_0: type = KvType::q4_0; return size % 32 == 0;
        default: return false;
    }
}

// Fills the problem from the node; false where anything is not as the kernels know it.
bool describe(const GgmlTensor* node, AttentionProblem& p) {
    const GgmlTensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
    if (q == nullptr || k == nullptr || v == nullptr || mask == nullptr || node->src[4] != nullptr) return false;
    const int64_t key_size = q->ne[0], value_size = v->ne[0], heads = q->ne[2], kv_heads = k->ne[2];
    const bool shapes = k->ne[0] == key_size && k->ne[1] == v->ne[1] && v->ne[2] == kv_heads && kv_heads > 0 &&
                        heads % kv_heads == 0 && key_size % 16 == 0 && value_size % 16 == 0 && key_size <= kMaxHeadSize &&
                        value_size <= kMaxHeadSize && mask->ne[0] >= k->ne[1] && mask->ne[1] >= q->ne[1];
    const bool one_stream = q->ne[3] == 1 && k->ne[3] == 1 && v->ne[3] == 1 && mask->ne[2] == 1 && mask->ne[3] == 1;
    const bool types = q->type == kGgmlTypeF32 && q->nb[0] == 4 && mask->type == kGgmlTypeF16 && mask->nb[0] == 2 &&
                       node->type == kGgmlTypeF32 && node->nb[0] == 4 && kv_type_of(k, key_size, p.k_type) &&
                       kv_type_of(v, value_size, p.v_type);
    if (!shapes || !one_stream || !types) return false;
    p.q = static_cast<const char*>(q->data), p.q_row_stride = q->nb[1], p.q_head_stride = q->nb[2];
    p.k = static_cast<const char*>(k->data), p.k_key_stride = k->nb[1], p.k_head_stride = k->nb[2];
    p.v = static_cast<const char*>(v->data), p.v_key_stride = v->nb[1], p.v_head_stride = v->nb[2];
    p.mask = static_cast<const char*>(mask->data), p.mask_row_stride = mask->nb[1];
    p.out = static_cast<char*>(node->data), p.out_row_stride = node->nb[2], p.out_head_stride = node->nb[1];
    p.num_rows = int(q->ne[1]), p.num_heads = int(heads), p.num_kv_heads = int(kv_heads), p.num_keys = int(k->ne[1]);
    p.key_size = int(key_size), p.value_size = int(value_size);
    return true;
}

// What ggml calls on each of its threads instead of its own attention.
void attend_node(GgmlTensor* node, int thread, int num_threads, void* user_data) {
    const Layer& layer = *static_cast<const Layer*>(user_data);
    GraphHook& hook = *layer.hook;
    AttentionProblem problem{};
    describe(node, problem);
    problem.scale = layer.scale, problem.softcap = layer.softcap;
    const auto started = std::chrono::steady_clock::now();
    hook.attend.run(problem, *hook.kernels, thread, num_threads);
    if (thread == 0)
        hook.nanoseconds += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - started).count();
}

void take(GraphHook& hook, GgmlTensor* node) {
    const int index = node->src[1] != nullptr ? layer_of(node->src[1]) : -1;
    AttentionProblem problem{};
    float max_bias = 0.0f;
    std::memcpy(&max_bias, node->op_params + 1, sizeof max_bias);
    const bool known = index >= 0 && max_bias == 0.0f && describe(node, problem) && hook.attend.reserve(problem, hook.num_threads);
    if (!known) {
        ++hook.nodes_theirs;
        if (index >= 0) hook.layers[index].theirs = true;
        return;
    }
    Layer& layer = hook.layers[index];
    std::memcpy(layer.their_op_params, node->op_params, sizeof layer.their_op_params);
    std::memcpy(&layer.scale, node->op_params, sizeof layer.scale);
    std::memcpy(&layer.softcap, node->op_params + 2, sizeof layer.softcap);
    layer.ours = true;
    node->op = hook.custom_op;
    std::memcpy(node->op_params, layer.op_params, sizeof node->op_params);
    ++hook.nodes_ours;
}

// llama.cpp computes the same graph again and again: a node that was taken stays taken until it is given back.
void give_back(GraphHook& hook, GgmlTensor* node) {
    const int index = node->src[1] != nullptr ? layer_of(node->src[1]) : -1;
    if (index < 0) return;
    const Layer& layer = hook.layers[index];
    if (std::memcmp(node->op_params, layer.op_params, sizeof node->op_params) != 0) return;
    node->op = hook.flash_attention_op;
    std::memcpy(node->op_params, layer.their_op_params, sizeof node->op_params);
}

}  // namespace

extern "C" GraphHook* lowtide_hook_new(const GgmlFunctions* ggml, const char* kernels, int num_threads, char* reason,
                                       size_t reason_size) {
    const KernelSet* found = find_kernels(kernels);
    GraphHook* hook = found == nullptr ? nullptr : new (std::nothrow) GraphHook();
    const char* wrong = found == nullptr ? "this build and processor have no such kernels" : "no memory for the hook";
    if (hook != nullptr) {
        hook->kernels = found;
        hook->active = true;
        hook->num_threads = num_threads;
        for (Layer& layer : hook->layers) layer.hook = hook;
        wrong = learn(*ggml, *hook, attend_node);
    }
    if (wrong == nullptr) return hook;
    std::snprintf(reason, reason_size, "%s", wrong);
    delete hook;
    return nullptr;
}

extern "C" void lowtide_hook_free(GraphHook* hook) { delete hook; }

extern "C" bool lowtide_hook_callback(void* tensor, bool ask, void* user_data) {
    auto& hook = *static_cast<GraphHook*>(user_data);
    auto* node = static_cast<GgmlTensor*>(tensor);
    if (ask && hook.active && node->op == hook.flash_attention_op) take(hook, node);
    if (ask && !hook.active && node->op == hook.custom_op) give_back(hook, node);
    return false;
}

extern "C" void lowtide_hook_set_active(GraphHook* hook, int active) { hook->active = active != 0; }

extern "C" HookCounts lowtide_hook_counts(const GraphHook* hook) {
    HookCounts counts{0, 0, hook->nodes_ours, hook->nodes_theirs, hook->nanoseconds, int64_t(hook->attend.scratch_bytes())};
    for (const Layer& layer : hook->layers) {
        counts.layers_ours += layer.ours && !layer.theirs;
        counts.layers_theirs += layer.theirs;
    }
    return counts;
}

extern "C" const char* lowtide_hook_kernels(const GraphHook* hook) { return hook->kernels->name; }

extern "C" int lowtide_attend(const AttentionProblem* problem, const char* kernels, int num_threads) {
    const KernelSet* found = find_kernels(kernels);
    if (found == nullptr) return 1;
    const AttentionProblem& p = *problem;
    const auto sized = [](int size) { return size > 0 && size <= kMaxHeadSize && size % 16 == 0; };
    if (p.num_rows < 1 || p.num_keys < 1 || p.num_kv_heads < 1 || p.num_heads < 1 || p.num_heads % p.num_kv_heads != 0 ||
        !sized(p.key_size) || !sized(p.value_size) || num_threads < 1)
        return 2;
    Attend attend;
    if (!attend.reserve(*problem, num_threads)) return 1;
    std::vector<std::thread> threads;
    for (int i = 1; i < num_threads; ++i)
        threads.emplace_back([&, i] { attend.run(*problem, *found, i, num_threads); });
    attend.run(*problem, *found, 0, num_threads);
    for (std::thread& thread : threads) thread.join();
    return 0;
}

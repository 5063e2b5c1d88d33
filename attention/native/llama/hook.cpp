// The evaluation callback. With flash attention on, the attention of every architecture is one FLASH_ATTN_EXT node.
// Before ggml's scheduler computes a split of the graph, it asks the callback about each node. There the node becomes
// a custom operation: it gets the `op` and `op_params` of one that ggml itself made. If the callback answers false,
// the split stays whole and nothing is copied or computed more often. If it answers true, because a layer is timed or
// weights are released, a part of the split ends there. A node with an unknown shape is left to llama.cpp and
// counted.

#include "llama/hook.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "attention/problem.h"
#include "llama/batch.h"
#include "llama/ggml_abi.h"
#include "llama/layer_timer.h"
#include "llama/weights/pass_reads.h"
#include "llama/weights/repacked_matmul.h"
#include "sparse/gem.h"
#include "sparse/policy.h"
#include "team.h"
#include "threads.h"

// What a replaced node does not say itself. Its custom operation gets this as user data.
struct HookedLayer {
    LlamaHook* hook;
    float scale, softcap;
    int32_t op_params[16];        // of the custom operation
    int32_t llama_op_params[16];  // of the node as llama.cpp made it
    bool is_native, is_fallback;
    int next_read;     // in the hook's PassReads
    LayerSlots slots;  // of the last batch with several sequences
};

struct LlamaHook {
    const AttentionKernels* kernels;
    GgmlFunctions ggml;
    GgmlOps ops;
    int32_t streamed_matmul_params[16];  // of the custom operation that streams a large matmul
    bool active;
    int num_threads;
    CurrentPolicy policy;
    Barrier barrier;
    GemScorer gem;
    VisibleKeyCounter visible;
    BatchLayout batch;
    WeightStream weights;
    StreamedMatmul streamed_matmul;
    PassReads reads;
    RepackedMatmul repacked_matmul{weights, reads, team};
    Team team;  // helps where ggml has one thread; ends first, since it reads memory of the others
    LayerTimer timer;
    HookedLayer layers[kMaxLayers];
    int64_t nodes_native, nodes_fallback, nanoseconds, keys_read, keys_visible, matmuls_streamed;
};

namespace {

AttentionProblem problem_of(const AttentionNode& view, int stream, const HookedLayer& layer) {
    AttentionProblem problem = view.problem(stream);
    problem.scale = layer.scale, problem.softcap = layer.softcap;
    problem.use_bf16 = layer.hook->policy.use_bf16;
    return problem;
}

// With fewer multiplications, a helper would take longer to see the work than the caller to do it.
bool is_worth_helpers(const AttentionProblem& problem) {
    constexpr int64_t kMinSharedMultiplies = 60000;
    return int64_t(problem.num_tokens) * problem.num_heads * problem.num_keys * problem.key_dim >= kMinSharedMultiplies;
}

void attend(const HookedLayer& layer, const AttentionNode& view, int thread, ThreadGroup& threads) {
    LlamaHook& hook = *layer.hook;
    const auto started = std::chrono::steady_clock::now();
    const int index = int(&layer - hook.layers);
    if (hook.gem.ends_at(index)) {
        hook.gem.run(problem_of(view, 0, layer), *hook.kernels, threads);
        return;
    }
    int64_t keys_read = 0, keys_visible = 0;
    for (int stream = 0; stream < view.num_streams(); ++stream) {
        const AttentionProblem problem = problem_of(view, stream, layer);
        const int visible = thread == 0 && stream == 0 ? hook.visible.count(problem, index) : 0;
        if (hook.batch.is_active() && hook.batch.matches_mask(problem, index, threads)) {
            if (thread == 0) hook.layers[index].slots.set(problem);
            const int num_sequences = hook.batch.num_sequences();
            if (hook.batch.keeps_busy(problem.num_kv_heads, threads.num_threads)) {
                hook.policy.dense().run_many(hook.batch.problems(), num_sequences, hook.batch.shared(), *hook.kernels, threads);
            } else {  // too few to go round, so the threads split the keys of each
                for (int i = 0; i < num_sequences; ++i) hook.policy.dense().run(hook.batch.problems()[i], *hook.kernels, threads);
            }
            keys_visible += visible, keys_read += visible;
            continue;
        }
        const int num_read = hook.policy.run(problem, index, stream, *hook.kernels, threads);
        keys_visible += visible;
        keys_read += num_read < visible ? num_read : visible;
    }
    if (thread != 0) return;
    const auto elapsed = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - started).count();
    hook.nanoseconds += elapsed;
    hook.timer.add_attention(index, elapsed);
    hook.keys_read += keys_read, hook.keys_visible += keys_visible;
}

// ggml calls this on each of its threads in place of its own attention.
void attend_node(GgmlTensor* node, int thread, int num_threads, void* user_data) {
    const HookedLayer& layer = *static_cast<const HookedLayer*>(user_data);
    LlamaHook& hook = *layer.hook;
    AttentionNode view;
    view.read(node);
    if (num_threads > 1) {
        hook.reads.note_computed();
        BarrierThreadGroup threads(hook.barrier, thread, num_threads);
        attend(layer, view, thread, threads);
    } else {
        hook.reads.announce(layer.next_read, hook.team);
        TeamThreadGroup threads(hook.team, !is_worth_helpers(view.problem(0)));
        attend(layer, view, 0, threads);
    }
}

void multiply_node(GgmlTensor* node, int thread, int num_threads, void* user_data) {
    auto& hook = *static_cast<LlamaHook*>(user_data);
    hook.streamed_matmul.multiply(node, thread, num_threads, hook.weights);
}

// The output matrix is larger than any layer: if it is streamed, it is released slice by slice during the matmul.
void stream_matmul(LlamaHook& hook, GgmlTensor* node) {
    constexpr size_t kLargeBytes = 2 << 20;
    const GgmlTensor* weights = node->src[0];
    if (weights->nb[1] * weights->ne[1] < kLargeBytes || !hook.weights.is_streamed_alone(weights)) return;
    try {
        if (!hook.streamed_matmul.can_replace(node, hook.ggml.matmul, hook.num_threads)) return;
    } catch (const std::bad_alloc&) {
        return;
    }
    node->op = hook.ops.custom;
    std::memcpy(node->op_params, hook.streamed_matmul_params, sizeof node->op_params);
    ++hook.matmuls_streamed;
}

// Reads the parameters of the custom operations from ggml. Returns an error message, or null.
const char* read_abi(LlamaHook& hook) {
    std::vector<CustomOp> custom_ops{{multiply_node, &hook, hook.streamed_matmul_params}};
    for (HookedLayer& layer : hook.layers) custom_ops.push_back({attend_node, &layer, layer.op_params});
    hook.repacked_matmul.list_ops(custom_ops);
    return read_ggml_abi(hook.ggml, hook.ops, custom_ops.data(), int(custom_ops.size()));
}

// The first keys and values, from which the kernels prefetch on.
void add_reads(LlamaHook& hook, const AttentionNode& view, int layer) {
    constexpr size_t kFirstBytes = 64 << 10;
    const AttentionProblem problem = view.problem(0);
    hook.reads.add(problem.k, std::min(problem.num_keys * problem.k_key_stride, kFirstBytes));
    hook.layers[layer].next_read = hook.reads.add(problem.v, std::min(problem.num_keys * problem.v_key_stride, kFirstBytes));
}

bool reserve(LlamaHook& hook, const AttentionNode& view, int layer) {
    if (hook.gem.ends_at(layer)) return view.num_streams() == 1 && hook.gem.reserve(view.problem(0), hook.num_threads);
    if (hook.batch.is_active() && view.num_streams() != 1) return false;
    for (int i = 0; i < hook.batch.num_sequences(); ++i)
        if (!hook.policy.dense().reserve(hook.batch.problem(view.problem(0), i), hook.num_threads) ||
            !hook.policy.dense().reserve_many(view.problem(0), hook.batch.shared(), hook.num_threads))
            return false;
    for (int stream = 0; stream < view.num_streams(); ++stream)
        if (!hook.policy.reserve(view.problem(stream), layer, stream, hook.num_threads)) return false;
    return true;
}

void replace_node(LlamaHook& hook, GgmlTensor* node) {
    const int index = AttentionNode::layer_of(node);
    AttentionNode view;
    float max_bias = 0.0f;
    std::memcpy(&max_bias, node->op_params + 1, sizeof max_bias);
    // nodes on a GPU are computed there
    const bool on_device = node->buffer != nullptr && !reinterpret_cast<bool (*)(void*)>(hook.ggml.is_host)(node->buffer);
    const bool is_known = index >= 0 && max_bias == 0.0f && !on_device && view.read(node) && reserve(hook, view, index);
    if (!is_known) {
        ++hook.nodes_fallback;
        if (index >= 0) hook.layers[index].is_fallback = true;
        return;
    }
    add_reads(hook, view, index);
    HookedLayer& layer = hook.layers[index];
    std::memcpy(layer.llama_op_params, node->op_params, sizeof layer.llama_op_params);
    std::memcpy(&layer.scale, node->op_params, sizeof layer.scale);
    std::memcpy(&layer.softcap, node->op_params + 2, sizeof layer.softcap);
    layer.is_native = true;
    node->op = hook.ops.custom;
    std::memcpy(node->op_params, layer.op_params, sizeof node->op_params);
    ++hook.nodes_native;
}

// llama.cpp computes the same graph repeatedly: a node stays replaced until it is restored. Custom operations of
// others are not touched.
bool is_replaced(const LlamaHook& hook, const GgmlTensor* node, int index) {
    return index >= 0 && std::memcmp(node->op_params, hook.layers[index].op_params, sizeof node->op_params) == 0;
}

void restore_node(LlamaHook& hook, GgmlTensor* node, int index) {
    node->op = hook.ops.flash_attn;
    std::memcpy(node->op_params, hook.layers[index].llama_op_params, sizeof node->op_params);
}

void keep_replaced(LlamaHook& hook, GgmlTensor* node, int index) {
    AttentionNode view;
    if (view.read(node) && reserve(hook, view, index)) {
        add_reads(hook, view, index);
        return;
    }
    restore_node(hook, node, index);
    ++hook.nodes_fallback;
    hook.layers[index].is_fallback = true;
}

// Whether the forward pass ends with this node, replaced or not: its layer scores a prompt.
bool ends_here(const LlamaHook& hook, const GgmlTensor* node) {
    const bool is_attention = node->op == hook.ops.custom || node->op == hook.ops.flash_attn;
    return is_attention && hook.gem.ends_at(AttentionNode::layer_of(node));
}

}  // namespace

extern "C" LlamaHook* lowtide_hook_new(const GgmlFunctions* ggml, const char* kernels, int num_threads, char* reason,
                                       size_t reason_size) {
    const AttentionKernels* found = find_attention_kernels(kernels);
    LlamaHook* hook = found == nullptr ? nullptr : new (std::nothrow) LlamaHook();
    const char* error = found == nullptr ? "this build and processor have no such kernels" : "no memory for the hook";
    if (hook != nullptr) {
        hook->kernels = found;
        hook->active = true;
        hook->num_threads = num_threads;
        hook->visible.reserve();
        for (HookedLayer& layer : hook->layers) layer.hook = hook;
        hook->ggml = *ggml;
        error = read_abi(*hook);
    }
    if (error == nullptr) return hook;
    std::snprintf(reason, reason_size, "%s", error);
    delete hook;
    return nullptr;
}

extern "C" void lowtide_hook_free(LlamaHook* hook) { delete hook; }

extern "C" bool lowtide_hook_callback(void* tensor, bool ask, void* user_data) {
    auto& hook = *static_cast<LlamaHook*>(user_data);
    auto* node = static_cast<GgmlTensor*>(tensor);
    if (!ask) {
        hook.weights.release_others(node);
        const bool goes_on = hook.timer.on_stop();
        return goes_on && !ends_here(hook, node);
    }
    hook.repacked_matmul.replace(node, hook.ops, hook.reads.begins_part());
    if (hook.active && node->op == hook.ops.flash_attn) {
        replace_node(hook, node);
    } else if (node->op == hook.ops.custom) {
        const int index = AttentionNode::layer_of(node);
        if (is_replaced(hook, node, index)) (hook.active ? keep_replaced : restore_node)(hook, node, index);
    } else if (node->op == hook.ops.mul_mat) {
        stream_matmul(hook, node);
    }
    // If either is true, the graph stops after this node and the callback is called again.
    const bool streams = hook.weights.enters_group(node), times = hook.timer.should_stop(node);
    return streams || times || ends_here(hook, node);
}

// The C API: Python calls it between forward passes.

extern "C" LayerTimer* lowtide_hook_timer(LlamaHook* hook) { return &hook->timer; }

extern "C" CurrentPolicy* lowtide_hook_policy(LlamaHook* hook) { return &hook->policy; }

extern "C" void lowtide_hook_set_threads(LlamaHook* hook, int num_threads) { hook->team.set_active(num_threads); }

extern "C" void lowtide_hook_settle(LlamaHook* hook) { hook->team.settle(); }

extern "C" int64_t lowtide_hook_taken_back(const LlamaHook* hook) { return hook->team.num_taken_back(); }

extern "C" void lowtide_hook_set_active(LlamaHook* hook, int active) {
    hook->active = active != 0;
    hook->policy.clear();
}

extern "C" int lowtide_hook_stream_weights(LlamaHook* hook, const WeightSpan* spans, int num_spans, const uint8_t* keep_resident,
                                           int num_groups) {
    return error_code([=] { return hook->weights.set(spans, num_spans, keep_resident, num_groups); });
}

extern "C" int lowtide_hook_set_repacked(LlamaHook* hook, const char* names, int max_rows, int max_columns) {
    return error_code([=] { return hook->repacked_matmul.set(names, max_rows, max_columns, hook->num_threads); }) == 0 ? 0 : 1;
}

extern "C" int lowtide_hook_set_batch(LlamaHook* hook, int num_shared, int num_sequences, const int32_t* num_tokens,
                                      const int32_t* const* slots, const int32_t* num_slots) {
    return error_code([=] {
        if (num_sequences > 0)
            for (HookedLayer& layer : hook->layers) layer.slots.clear();
        hook->batch.set(num_shared, num_sequences, num_tokens, slots, num_slots);
        return true;
    });
}

extern "C" int lowtide_hook_copy_slot(LlamaHook* hook, int from, int to) {
    int num_copied = 0;
    for (const HookedLayer& layer : hook->layers) num_copied += layer.slots.copy(from, to);
    return num_copied;
}

extern "C" int64_t lowtide_hook_batches_refused(const LlamaHook* hook) { return hook->batch.num_refused(); }

extern "C" void lowtide_hook_score_prompt(LlamaHook* hook, int layer, const ScoreRule* rule, int is_last) {
    if (layer < 0)
        hook->gem.stop();
    else
        hook->gem.start(layer, *rule, is_last != 0);
}

extern "C" int lowtide_hook_prompt_scores(const LlamaHook* hook, float* scores, int size) {
    const int num_scored = hook->gem.num_scored();
    if (num_scored >= size) std::memcpy(scores, hook->gem.scores(), sizeof(float) * size);
    return num_scored;
}

extern "C" int lowtide_hook_supports_bf16(const LlamaHook* hook) { return hook->kernels->attend_keys_bf16 != nullptr; }

extern "C" HookCounts lowtide_hook_counts(const LlamaHook* hook) {
    const size_t scratch_bytes =
        hook->policy.scratch_bytes() + hook->gem.scratch_bytes() + hook->repacked_matmul.scratch_bytes() + hook->team.num_bytes() + hook->batch.num_bytes();
    HookCounts counts{0, 0, hook->nodes_native, hook->nodes_fallback, hook->nanoseconds, int64_t(scratch_bytes),
                      hook->keys_read, hook->keys_visible, hook->weights.freed_bytes(), hook->matmuls_streamed,
                      hook->repacked_matmul.num_replaced(), hook->repacked_matmul.num_steps(), hook->repacked_matmul.num_refused()};
    for (const HookedLayer& layer : hook->layers) {
        counts.layers_native += layer.is_native && !layer.is_fallback;
        counts.layers_fallback += layer.is_fallback;
    }
    return counts;
}

extern "C" const char* lowtide_hook_kernels(const LlamaHook* hook) { return hook->kernels->name; }

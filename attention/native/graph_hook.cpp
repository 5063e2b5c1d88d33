// The evaluation callback: recognises llama.cpp's attention nodes and gives them to our kernel.
//
// With flash attention on, the attention of every architecture is one FLASH_ATTN_EXT node. Before a split
// is computed the scheduler asks about each of its nodes; there the node becomes a custom operation, by
// copying `op` and `op_params` from one that ggml itself made. Answering false keeps the split whole, so
// nothing is copied and nothing runs more often; true, where a layer is timed or weights are given back, ends a
// part of it there. A node that is not as we know it is left alone and counted.

#include <chrono>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "hook_state.h"

namespace {

AttentionProblem problem_of(const AttentionNode& read, int stream, const HookedLayer& layer) {
    AttentionProblem problem = read.problem(stream);
    problem.scale = layer.scale, problem.softcap = layer.softcap;
    problem.rounded = layer.hook->attend.rounded;
    return problem;
}

// What ggml calls on each of its threads instead of its own attention.
void attend_node(GgmlTensor* node, int thread, int num_threads, void* user_data) {
    const HookedLayer& layer = *static_cast<const HookedLayer*>(user_data);
    GraphHook& hook = *layer.hook;
    ThreadOfTeam team(hook.barrier, thread, num_threads);
    AttentionNode read;
    read.read(node);
    const auto started = std::chrono::steady_clock::now();
    const int index = int(&layer - hook.layers);
    if (hook.prompt_scores.end_with(index)) {
        hook.prompt_scores.run(problem_of(read, 0, layer), *hook.kernels, team);
        return;
    }
    int64_t keys_read = 0, keys_held = 0;
    for (int stream = 0; stream < read.num_streams(); ++stream) {
        const AttentionProblem problem = problem_of(read, stream, layer);
        const int visible = thread == 0 && stream == 0 ? hook.visible.count(problem, index) : 0;
        if (hook.parts.active() && hook.parts.agree(problem, index, num_threads)) {
            if (thread == 0) hook.layers[index].cells.set(problem);
            const int count = hook.parts.num_parts();
            if (count * problem.num_kv_heads >= 2 * num_threads) {
                hook.attend.tidal.run_many(hook.parts.problems(), count, *hook.kernels, thread, num_threads);
            } else {  // too few to go round: their keys are shared out
                for (int i = 0; i < count; ++i) hook.attend.tidal.run(hook.parts.problems()[i], index, *hook.kernels, team);
            }
            keys_held += visible, keys_read += visible;
            continue;
        }
        const int num_read = hook.attend.run(problem, index, stream, *hook.kernels, team);
        keys_held += visible;
        keys_read += num_read < visible ? num_read : visible;
    }
    if (thread != 0) return;
    const auto taken = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - started).count();
    hook.nanoseconds += taken;
    hook.clock.add_attention(index, taken);
    hook.keys_read += keys_read, hook.keys_held += keys_held;
}

void multiply_node(GgmlTensor* node, int thread, int num_threads, void* user_data) {
    auto& hook = *static_cast<GraphHook*>(user_data);
    hook.product.multiply(node, thread, num_threads, hook.weights);
}

// The output's matrix is larger than any layer: where it is given back, it is so while it is used.
void take_product(GraphHook& hook, GgmlTensor* node) {
    constexpr size_t kLargeBytes = 2 << 20;
    const GgmlTensor* weights = node->src[0];
    if (weights->nb[1] * weights->ne[1] < kLargeBytes || !hook.weights.is_streamed_alone(weights)) return;
    try {
        if (!hook.product.can_take(node, hook.ggml.product, hook.num_threads)) return;
    } catch (const std::bad_alloc&) {
        return;
    }
    node->op = hook.ops.custom;
    std::memcpy(node->op_params, hook.product_params, sizeof node->op_params);
    ++hook.products_sliced;
}

// Takes the custom operations' parameters from ggml. Returns what is wrong, or null.
const char* learn(GraphHook& hook) {
    std::vector<CustomOp> wanted{{multiply_node, &hook, hook.product_params}};
    for (HookedLayer& layer : hook.layers) wanted.push_back({attend_node, &layer, layer.op_params});
    hook.packed.want(wanted);
    return learn_ops(hook.ggml, hook.ops, wanted.data(), int(wanted.size()));
}

bool make_room(GraphHook& hook, const AttentionNode& read, int layer) {
    if (hook.prompt_scores.end_with(layer)) return read.num_streams() == 1 && hook.prompt_scores.reserve(read.problem(0), hook.num_threads);
    if (hook.parts.active() && read.num_streams() != 1) return false;
    for (int i = 0; i < hook.parts.num_parts(); ++i)
        if (!hook.attend.tidal.reserve(hook.parts.problem(read.problem(0), i), layer, hook.num_threads) ||
            !hook.attend.tidal.reserve_many(read.problem(0), hook.num_threads))
            return false;
    for (int stream = 0; stream < read.num_streams(); ++stream)
        if (!hook.attend.reserve(read.problem(stream), layer, stream, hook.num_threads)) return false;
    return true;
}

void take(GraphHook& hook, GgmlTensor* node) {
    const int index = AttentionNode::layer_of(node);
    AttentionNode read;
    float max_bias = 0.0f;
    std::memcpy(&max_bias, node->op_params + 1, sizeof max_bias);
    // What lies on a device is computed there.
    const bool on_device = node->buffer != nullptr && !reinterpret_cast<bool (*)(void*)>(hook.ggml.is_host)(node->buffer);
    const bool known = index >= 0 && max_bias == 0.0f && !on_device && read.read(node) && make_room(hook, read, index);
    if (!known) {
        ++hook.nodes_theirs;
        if (index >= 0) hook.layers[index].theirs = true;
        return;
    }
    HookedLayer& layer = hook.layers[index];
    std::memcpy(layer.their_op_params, node->op_params, sizeof layer.their_op_params);
    std::memcpy(&layer.scale, node->op_params, sizeof layer.scale);
    std::memcpy(&layer.softcap, node->op_params + 2, sizeof layer.softcap);
    layer.ours = true;
    node->op = hook.ops.custom;
    std::memcpy(node->op_params, layer.op_params, sizeof node->op_params);
    ++hook.nodes_ours;
}

// llama.cpp computes the same graph again and again: a node that was taken stays taken until it is given back.
// What else runs as a custom operation is not ours to touch.
bool is_taken(const GraphHook& hook, const GgmlTensor* node, int index) {
    return index >= 0 && std::memcmp(node->op_params, hook.layers[index].op_params, sizeof node->op_params) == 0;
}

void give_back(GraphHook& hook, GgmlTensor* node, int index) {
    node->op = hook.ops.flash_attention;
    std::memcpy(node->op_params, hook.layers[index].their_op_params, sizeof node->op_params);
}

void keep(GraphHook& hook, GgmlTensor* node, int index) {
    AttentionNode read;
    if (read.read(node) && make_room(hook, read, index)) return;
    give_back(hook, node, index);
    ++hook.nodes_theirs;
    hook.layers[index].theirs = true;
}

// Whether a pass goes no further than this node, taken or not: a prompt is scored by its layer.
bool ends_here(const GraphHook& hook, const GgmlTensor* node) {
    const bool is_attention = node->op == hook.ops.custom || node->op == hook.ops.flash_attention;
    return is_attention && hook.prompt_scores.end_with(AttentionNode::layer_of(node));
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
        hook->visible.reserve();
        for (HookedLayer& layer : hook->layers) layer.hook = hook;
        hook->ggml = *ggml;
        wrong = learn(*hook);
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
    if (!ask) {
        hook.weights.leave_others(node);
        const bool goes_on = hook.clock.stopped();
        return goes_on && !ends_here(hook, node);
    }
    hook.packed.take(node, hook.ops);
    if (hook.active && node->op == hook.ops.flash_attention) {
        take(hook, node);
    } else if (node->op == hook.ops.custom) {
        const int index = AttentionNode::layer_of(node);
        if (is_taken(hook, node, index)) (hook.active ? keep : give_back)(hook, node, index);
    } else if (node->op == hook.ops.product) {
        take_product(hook, node);
    }
    // Where either wants it, the graph stops behind this node and comes back here.
    const bool streams = hook.weights.enters_group(node), times = hook.clock.wants(node);
    return streams || times || ends_here(hook, node);
}

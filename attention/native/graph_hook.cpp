// The evaluation callback: recognises llama.cpp's attention nodes and gives them to our kernel.
//
// With flash attention on, the attention of every architecture is one FLASH_ATTN_EXT node. Before a split
// is computed the scheduler asks about each of its nodes; there the node becomes a custom operation, by
// copying `op` and `op_params` from one that ggml itself made. Answering false keeps the split whole, so
// nothing is copied and nothing runs more often; true, where a layer is timed or weights are given back, ends a
// part of it there. A node that is not as we know it is left alone and counted.

#include "graph_hook.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "attention_node.h"
#include "attention_problem.h"
#include "custom_ops.h"
#include "delta_attend.h"
#include "ggml_tensor.h"
#include "layer_clock.h"
#include "prompt_scores.h"
#include "tidal_attend.h"
#include "visible_keys.h"

namespace {

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
    GgmlFunctions ggml;
    OpNumbers ops;
    int32_t product_params[16];  // of the custom operation that a large product becomes
    bool active, rounded;
    int num_threads;
    TidalAttend attend;
    DeltaAttend delta;
    PromptScores prompt_scores;
    VisibleKeys visible;
    WeightStream weights;
    SlicedProduct product;
    LayerClock clock;
    Layer layers[kMaxLayers];
    int64_t nodes_ours, nodes_theirs, nanoseconds, keys_read, keys_held, products_sliced;
};

namespace {

AttentionProblem problem_of(const AttentionNode& read, int stream, const Layer& layer) {
    AttentionProblem problem = read.problem(stream);
    problem.scale = layer.scale, problem.softcap = layer.softcap;
    problem.rounded = layer.hook->rounded;
    return problem;
}

// What ggml calls on each of its threads instead of its own attention.
void attend_node(GgmlTensor* node, int thread, int num_threads, void* user_data) {
    const Layer& layer = *static_cast<const Layer*>(user_data);
    GraphHook& hook = *layer.hook;
    AttentionNode read;
    read.read(node);
    const auto started = std::chrono::steady_clock::now();
    const int index = int(&layer - hook.layers);
    if (hook.prompt_scores.end_with(index)) {
        hook.prompt_scores.run(problem_of(read, 0, layer), *hook.kernels, thread, num_threads);
        return;
    }
    int64_t keys_read = 0, keys_held = 0;
    for (int stream = 0; stream < read.num_streams(); ++stream) {
        const AttentionProblem problem = problem_of(read, stream, layer);
        const int visible = thread == 0 && stream == 0 ? hook.visible.count(problem, index) : 0;
        int num_read = hook.delta.run(problem, index, stream, *hook.kernels, thread, num_threads);
        if (num_read == DeltaAttend::kNotTaken) {
            num_read = hook.attend.run(problem, index, *hook.kernels, thread, num_threads);
            if (thread == 0) hook.delta.measure(problem, index);
        }
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
    for (Layer& layer : hook.layers) wanted.push_back({attend_node, &layer, layer.op_params});
    return learn_ops(hook.ggml, hook.ops, wanted.data(), int(wanted.size()));
}

bool make_room(GraphHook& hook, const AttentionNode& read, int layer) {
    if (hook.prompt_scores.end_with(layer)) return read.num_streams() == 1 && hook.prompt_scores.reserve(read.problem(0), hook.num_threads);
    for (int stream = 0; stream < read.num_streams(); ++stream)
        if (!hook.attend.reserve(read.problem(stream), layer, hook.num_threads) ||
            !hook.delta.reserve(read.problem(stream), layer, stream, hook.num_threads))
            return false;
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
    Layer& layer = hook.layers[index];
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

// Does the work; 1 where there is no memory for it.
template <class Work> int failed(const Work& work) {
    try {
        work();
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
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
        for (Layer& layer : hook->layers) layer.hook = hook;
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

extern "C" LayerClock* lowtide_hook_clock(GraphHook* hook) { return &hook->clock; }

extern "C" void lowtide_hook_set_active(GraphHook* hook, int active) { hook->active = active != 0, hook->delta.cut(0); }

extern "C" int lowtide_hook_set_roles(GraphHook* hook, const uint8_t* roles, int num_layers, const SelectionRule* rule) {
    return failed([=] { hook->attend.set_roles(roles, num_layers < kMaxLayers ? num_layers : kMaxLayers, *rule); });
}

extern "C" int lowtide_hook_set_groups(GraphHook* hook, const DeltaRule* rule, const uint8_t* num_groups, const float* scales, int num_layers,
                                       int num_kv_heads, int key_size) {
    const int num_known = num_layers < kMaxLayers ? num_layers : kMaxLayers;
    return failed([=] { hook->delta.set_units(*rule, num_groups, scales, num_known, num_kv_heads, key_size); });
}

extern "C" void lowtide_hook_start_grouped(GraphHook* hook, int grouped) { hook->delta.start_pass(grouped != 0); }

extern "C" int lowtide_hook_measure_groups(GraphHook* hook) { return failed([=] { hook->delta.start_measuring(); }); }

extern "C" void lowtide_hook_read_measures(const GraphHook* hook, float* errors, float* squares) { hook->delta.read_measures(errors, squares); }

extern "C" void lowtide_hook_cut(GraphHook* hook, int num_cells) { hook->delta.cut(num_cells); }

extern "C" int lowtide_hook_stream_weights(GraphHook* hook, const WeightSpan* spans, int num_spans, const uint8_t* kept,
                                           int num_groups) {
    try {
        return hook->weights.set(spans, num_spans, kept, num_groups) ? 0 : 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

extern "C" void lowtide_hook_start_pass(GraphHook* hook, int sparse, int refresh, int rounded) {
    hook->attend.start_pass(sparse != 0, refresh != 0);
    hook->delta.start_pass(false);
    hook->rounded = rounded != 0;
}

extern "C" void lowtide_hook_score_prompt(GraphHook* hook, int layer, const ScoreRule* rule, int is_last) {
    if (layer < 0)
        hook->prompt_scores.stop();
    else
        hook->prompt_scores.start(layer, *rule, is_last != 0);
}

extern "C" int lowtide_hook_prompt_scores(const GraphHook* hook, float* scores, int size) {
    const int num_scored = hook->prompt_scores.num_scored();
    if (num_scored >= size) std::memcpy(scores, hook->prompt_scores.scores(), sizeof(float) * size);
    return num_scored;
}

extern "C" int lowtide_hook_can_round(const GraphHook* hook) { return hook->kernels->attend_rounded != nullptr; }

extern "C" HookCounts lowtide_hook_counts(const GraphHook* hook) {
    HookCounts counts{0, 0, hook->nodes_ours, hook->nodes_theirs, hook->nanoseconds, int64_t(hook->attend.scratch_bytes() + hook->delta.scratch_bytes() + hook->prompt_scores.scratch_bytes()),
                      hook->keys_read, hook->keys_held, hook->weights.given_back_bytes(), hook->products_sliced};
    for (const Layer& layer : hook->layers) {
        counts.layers_ours += layer.ours && !layer.theirs;
        counts.layers_theirs += layer.theirs;
    }
    return counts;
}

extern "C" const char* lowtide_hook_kernels(const GraphHook* hook) { return hook->kernels->name; }

#pragma once

#include "attention_node.h"
#include "attention_problem.h"
#include "barrier.h"
#include "custom_ops.h"
#include "ggml_tensor.h"
#include "graph_hook.h"
#include "layer_cells.h"
#include "layer_clock.h"
#include "packed_products.h"
#include "pass_parts.h"
#include "policy_attend.h"
#include "prompt_scores.h"
#include "visible_keys.h"

// What a node says beside its sources, and where its kernel finds everything else.
struct HookedLayer {
    GraphHook* hook;
    float scale, softcap;
    int32_t op_params[16];        // of the custom operation
    int32_t their_op_params[16];  // of the node as llama.cpp made it
    bool ours, theirs;
    LayerCells cells;  // of the last pass in parts
};

// What a hook keeps: `graph_hook.cpp` uses it while a graph runs, `hook_calls.cpp` sets and tells it between passes.
struct GraphHook {
    const KernelSet* kernels;
    GgmlFunctions ggml;
    OpNumbers ops;
    int32_t product_params[16];  // of the custom operation that a large product becomes
    bool active;
    int num_threads;
    PolicyAttend attend;
    Barrier barrier;
    PromptScores prompt_scores;
    VisibleKeys visible;
    PassParts parts;
    WeightStream weights;
    SlicedProduct product;
    PackedProducts packed{weights};
    LayerClock clock;
    HookedLayer layers[kMaxLayers];
    int64_t nodes_ours, nodes_theirs, nanoseconds, keys_read, keys_held, products_sliced;
};

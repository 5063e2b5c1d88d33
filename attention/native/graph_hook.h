#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"
#include "custom_ops.h"
#include "prompt_scores.h"
#include "weight_stream.h"

// Swaps llama.cpp's attention nodes for our kernels, through the evaluation callback of a context.
struct GraphHook;
class LayerClock;
class PolicyAttend;

// Counts of one hook since it was made.
struct HookCounts {
    int64_t layers_ours;    // layers whose attention ran through our kernel
    int64_t layers_theirs;  // layers with at least one node left to llama.cpp
    int64_t nodes_ours;
    int64_t nodes_theirs;
    int64_t nanoseconds;  // in our kernel, as the first thread saw it
    int64_t scratch_bytes;
    int64_t keys_read;  // that were attended to, over all layers and passes
    int64_t keys_held;  // that each pass's last row sees, in its first stream
    int64_t weight_bytes_given_back;
    int64_t products_sliced;
    int64_t products_packed, packed_refused;
};

// Makes a hook for a context of `num_threads` threads, or returns null and writes why not, in words, to `reason` (`reason_size` bytes): this ggml's
// tensors are not laid out as we know them, or there are no kernels called `kernels` (null: the best ones).
LOWTIDE_API GraphHook* lowtide_hook_new(const GgmlFunctions* ggml, const char* kernels, int num_threads,
                                        char* reason, size_t reason_size);
LOWTIDE_API void lowtide_hook_free(GraphHook* hook);

// The function and the user data of llama_context_params.cb_eval; user data is the hook.
LOWTIDE_API bool lowtide_hook_callback(void* tensor, bool ask, void* hook);

LOWTIDE_API void lowtide_hook_set_active(GraphHook* hook, int active);
LOWTIDE_API HookCounts lowtide_hook_counts(const GraphHook* hook);
LOWTIDE_API const char* lowtide_hook_kernels(const GraphHook* hook);

// The clock of the hook's passes, alive as long as the hook.
LOWTIDE_API LayerClock* lowtide_hook_clock(GraphHook* hook);

// What attends in the hook's passes, alive as long as the hook: policies are set on it (`policy_attend.h`).
LOWTIDE_API PolicyAttend* lowtide_hook_policy(GraphHook* hook);

// Has the rows of the next passes be those of several sequences (`PassParts`): part i has num_rows[i] of them, and
// its keys lie in the first `num_shared` cells and in num_cells[i] cells of its own, in the order of its tokens. None:
// a pass is one sequence's again. Returns 1 where there is no memory. How many masks said otherwise is counted.
LOWTIDE_API int lowtide_hook_set_parts(GraphHook* hook, int num_shared, int num_parts, const int32_t* num_rows,
                                       const int32_t* const* cells, const int32_t* num_cells);
LOWTIDE_API int64_t lowtide_hook_parts_refused(const GraphHook* hook);

// Copies the keys and values of a cell over those of another, in every layer that attended to the last parts; both
// lay before the end of what that pass saw. Returns the number of layers.
LOWTIDE_API int lowtide_hook_copy_cell(GraphHook* hook, int from, int to);

// Has passes from now on end behind the attention of `layer`; where `is_last`, each key of the cache is scored
// there (`PromptScores`). Below 0, passes are whole again.
LOWTIDE_API void lowtide_hook_score_prompt(GraphHook* hook, int layer, const ScoreRule* rule, int is_last);

// Copies the first `size` scores of the last such pass, if it made so many, and returns how many it made.
LOWTIDE_API int lowtide_hook_prompt_scores(const GraphHook* hook, float* scores, int size);

// Whether the kernels can multiply in bfloat16.
LOWTIDE_API int lowtide_hook_can_round(const GraphHook* hook);

// Has tensors of these names, one a line, read as packed ones (`PackedProducts`), by products of so many rows and
// columns at most. Returns 1 where there is no memory.
LOWTIDE_API int lowtide_hook_read_packed(GraphHook* hook, const char* names, int max_rows, int max_columns);

// Has the weights of all groups but the kept ones given back as the graph goes on (`WeightStream`). Returns 1
// where there is no memory, 2 where the spans are not in order or of no such group.
LOWTIDE_API int lowtide_hook_stream_weights(GraphHook* hook, const WeightSpan* spans, int num_spans, const uint8_t* kept,
                                            int num_groups);

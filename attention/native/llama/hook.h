#pragma once

// Replaces nodes of llama.cpp's graph through the evaluation callback of a context: attention, repacked matmuls and
// streamed weights.

#include <cstddef>
#include <cstdint>

#include "c_api.h"
#include "llama/ggml_abi.h"
#include "llama/weights/weight_streaming.h"
#include "sparse/gem.h"

struct LlamaHook;
class LayerTimer;
class CurrentPolicy;

// Totals since the hook was made.
struct HookCounts {
    int64_t layers_native;    // layers whose attention ran in lowtide's kernels
    int64_t layers_fallback;  // layers with at least one node left to llama.cpp
    int64_t nodes_native;
    int64_t nodes_fallback;
    int64_t nanoseconds;  // in the attention kernels, measured on the first thread
    int64_t scratch_bytes;
    int64_t keys_read;     // attended to, over all layers and passes
    int64_t keys_visible;  // visible to the last token of each pass, in its first stream
    int64_t weight_bytes_freed;
    int64_t matmuls_streamed;
    int64_t matmuls_repacked, matmul_steps, repacked_refused;
};

// Makes a hook for a context of `num_threads` threads. `kernels` names an instruction set; null takes the best one.
// Returns null and writes the reason to `reason` (`reason_size` bytes) if this ggml has another binary interface or
// there are no such kernels.
LOWTIDE_API LlamaHook* lowtide_hook_new(const GgmlFunctions* ggml, const char* kernels, int num_threads,
                                        char* reason, size_t reason_size);
LOWTIDE_API void lowtide_hook_free(LlamaHook* hook);

// llama_context_params.cb_eval. Its user data is the hook.
LOWTIDE_API bool lowtide_hook_callback(void* tensor, bool ask, void* hook);

LOWTIDE_API void lowtide_hook_set_active(LlamaHook* hook, int is_active);

// Where ggml has one thread, the hook's nodes have helpers beside it: from now on `num_threads` threads compute them.
// `settle` waits until none of the helpers reads memory of the graph. `taken_back` counts the pieces of work that were
// computed again, because a helper had lost its core.
LOWTIDE_API void lowtide_hook_set_threads(LlamaHook* hook, int num_threads);
LOWTIDE_API void lowtide_hook_settle(LlamaHook* hook);
LOWTIDE_API int64_t lowtide_hook_taken_back(const LlamaHook* hook);

LOWTIDE_API HookCounts lowtide_hook_counts(const LlamaHook* hook);
LOWTIDE_API const char* lowtide_hook_kernels(const LlamaHook* hook);

// The timer of the hook's forward passes. It lives as long as the hook.
LOWTIDE_API LayerTimer* lowtide_hook_timer(LlamaHook* hook);

// The attention policy of the hook's forward passes (sparse/policy.h). It lives as long as the hook.
LOWTIDE_API CurrentPolicy* lowtide_hook_policy(LlamaHook* hook);

// Describes the batch of the next forward passes (BatchLayout): sequence i has num_tokens[i] tokens; its keys are in
// the first `num_shared` slots and in num_slots[i] slots of its own, in the order of its tokens. No sequences: a
// batch is one sequence again. Returns 1 if there is no memory. `batches_refused` counts the masks that contradict
// the layout.
LOWTIDE_API int lowtide_hook_set_batch(LlamaHook* hook, int num_shared, int num_sequences, const int32_t* num_tokens,
                                       const int32_t* const* slots, const int32_t* num_slots);
LOWTIDE_API int64_t lowtide_hook_batches_refused(const LlamaHook* hook);

// Copies the keys and values of slot `from` to slot `to` in every layer that attended to the last batch with several
// sequences. That batch must have seen both slots. Returns the number of layers.
LOWTIDE_API int lowtide_hook_copy_slot(LlamaHook* hook, int from, int to);

// From now on, forward passes end after the attention of `layer`; if `is_last`, every key of the cache is scored
// there (GemScorer). A negative layer runs whole passes again.
LOWTIDE_API void lowtide_hook_score_prompt(LlamaHook* hook, int layer, const ScoreRule* rule, int is_last);

// Copies the first `size` scores of the last such pass if there are so many. Returns how many there are.
LOWTIDE_API int lowtide_hook_prompt_scores(const LlamaHook* hook, float* scores, int size);

// Whether the kernels can multiply in bfloat16.
LOWTIDE_API int lowtide_hook_supports_bf16(const LlamaHook* hook);

// Declares the tensors of these names, one per line, as repacked (RepackedMatmul), for matmuls of up to `max_rows`
// rows and `max_columns` columns. Returns 1 if there is no memory.
LOWTIDE_API int lowtide_hook_set_repacked(LlamaHook* hook, const char* names, int max_rows, int max_columns);

// Releases the weights of all groups without a flag in `keep_resident` as the graph advances (WeightStream). Returns
// 1 if there is no memory, 2 if the spans are not in order or have an unknown group.
LOWTIDE_API int lowtide_hook_stream_weights(LlamaHook* hook, const WeightSpan* spans, int num_spans, const uint8_t* keep_resident,
                                            int num_groups);

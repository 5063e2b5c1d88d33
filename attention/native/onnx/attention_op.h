#pragma once

// lowtide's attention as an operator of onnxruntime.

#include <cstddef>
#include <cstdint>

#include "attention/problem.h"
#include "c_api.h"
#include "sparse/gem.h"
#include "threads.h"

// The attention of one layer of an ONNX graph, as long as the model is open. Python fills it in.
//
// The caches are (num_slots, num_kv_heads, head_dim) of `cache_type`, float32 or float16. `cosines` and `sines`,
// (num_slots or more, rotary_pairs) floats, rotate queries and keys first; they may be null. Pairs are neighbours if
// `interleaved`, else half the rotated channels apart. Tokens of a causal layer see the keys up to their own, with
// `window` only the last ones of these; other layers see every key. Layers with the same `mask`, an index below the
// number of layers, share a mask.
struct OnnxLayer {
    char *k_cache, *v_cache;
    const float *cosines, *sines;
    int32_t cache_type, num_slots, num_heads, num_kv_heads, head_dim, rotary_pairs, interleaved, is_packed, is_causal, window, mask;
    float scale, softcap;
};

// What a node reads and writes in a forward pass: contiguous tokens of `element`s, float32 or float16. If packed,
// `query` also has the keys and values. `bias`, which may be null, has (bias_tokens, bias_keys) elements.
struct OnnxAttentionInputs {
    enum Bias : int32_t { kF32, kF16, kBool };
    const char *query, *key, *value;
    char* out;
    KvType element;
    const char* bias;
    Bias bias_element;
    int64_t bias_tokens, bias_keys;
};

// The attention of one model. `new` returns null if there are no such kernels or no memory.
class OnnxAttention;
LOWTIDE_API OnnxAttention* lowtide_onnx_new(const char* kernels, int num_threads);
LOWTIDE_API void lowtide_onnx_free(OnnxAttention* attention);
LOWTIDE_API int lowtide_onnx_supports_bf16(const OnnxAttention* attention);
LOWTIDE_API const char* lowtide_onnx_kernels(const OnnxAttention* attention);

// The attention policy (sparse/policy.h). It lives as long as the OnnxAttention.
class CurrentPolicy;
LOWTIDE_API CurrentPolicy* lowtide_onnx_policy(OnnxAttention* attention);

// The handle under which graph nodes find it. A handle is never used twice.
LOWTIDE_API int64_t lowtide_onnx_handle(const OnnxAttention* attention);

// Between forward passes. Returns 1 if there is no memory, 2 for an unsupported shape.
LOWTIDE_API int lowtide_onnx_set_layers(OnnxAttention* attention, const OnnxLayer* layers, int num_layers);

// From now on, passes use at most `num_threads` of the threads.
LOWTIDE_API void lowtide_onnx_set_threads(OnnxAttention* attention, int num_threads);

// Begins a forward pass of `num_tokens` tokens, which go to the slots from `num_past` on.
LOWTIDE_API void lowtide_onnx_begin(OnnxAttention* attention, int num_past, int num_tokens);

// From now on, forward passes end with a layer: its node fails, so the session's run fails and nothing after it is
// computed. With `is_last` the layer's keys are scored (sparse/gem.h). A negative layer runs whole passes again.
LOWTIDE_API void lowtide_onnx_score_prompt(OnnxAttention* attention, int layer, const ScoreRule* rule, int is_last);

// Whether the last forward pass ended that way.
LOWTIDE_API int lowtide_onnx_has_ended(const OnnxAttention* attention);

// Copies the scores of the first `size` keys if there are so many. Returns how many there are.
LOWTIDE_API int lowtide_onnx_prompt_scores(const OnnxAttention* attention, float* scores, int size);

// Keys attended to, and visible to the last token, over all layers and passes; and the bytes of scratch.
struct OnnxCounts {
    int64_t keys_read, keys_visible, nodes, nanoseconds, scratch_bytes;
};
LOWTIDE_API OnnxCounts lowtide_onnx_counts(const OnnxAttention* attention);

// The functions that a graph node calls. `find` returns null for an unknown handle.
OnnxAttention* find_onnx_attention(int64_t handle);
int num_tokens_of(const OnnxAttention& attention);
const OnnxLayer* layer_of(const OnnxAttention& attention, int64_t layer);
int num_useful_threads(const OnnxAttention& attention, const OnnxLayer& layer);

// Appends the tokens to the layer's cache and attends. Returns an error message, or null.
const char* append_and_attend(OnnxAttention& attention, int64_t layer, const OnnxAttentionInputs& inputs, ThreadGroup& threads);

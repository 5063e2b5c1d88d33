#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"
#include "attention_problem.h"
#include "prompt_scores.h"
#include "team.h"

// The attention of one layer of an ONNX graph, as long as the model is open. Python fills it.
//
// The caches are (num_cells, num_kv_heads, head_size) of `cache_type`, f32 or f16. `cosines` and `sines`, (num_cells or
// more, rotary_pairs) floats, turn queries and keys before, or are null; pairs lie side by side with `interleaved`,
// else half the turned channels apart. Rows see every key, of a causal layer those up to themselves and, with `window`,
// the last so many of them. Layers with the same `mask`, below the number of layers, see the same keys.
struct OnnxLayer {
    char *k_cache, *v_cache;
    const float *cosines, *sines;
    int32_t cache_type, num_cells, num_heads, num_kv_heads, head_size, rotary_pairs, interleaved, is_packed, is_causal, window, mask;
    float scale, softcap;
};

// What a node reads and writes in a pass: rows of `element`s, f32 or f16, side by side. `query` has keys and values
// beside where they are packed. `bias`, or null, is of (bias_rows, bias_keys) elements.
struct OnnxRows {
    enum Bias : int32_t { kF32, kF16, kBool };
    const char *query, *key, *value;
    char* out;
    KvType element;
    const char* bias;
    Bias bias_element;
    int64_t bias_rows, bias_keys;
};

// What attends for one model. Null where there are no such kernels, or no memory.
class OnnxAttend;
LOWTIDE_API OnnxAttend* lowtide_onnx_new(const char* kernels, int num_threads);
LOWTIDE_API void lowtide_onnx_free(OnnxAttend* attend);
LOWTIDE_API int lowtide_onnx_can_round(const OnnxAttend* attend);
LOWTIDE_API const char* lowtide_onnx_kernels(const OnnxAttend* attend);

// What attends in the graph's passes, alive as long as this: policies are set on it (`policy_attend.h`).
class PolicyAttend;
LOWTIDE_API PolicyAttend* lowtide_onnx_policy(OnnxAttend* attend);

// The number by which nodes of a graph name it; never that of another.
LOWTIDE_API int64_t lowtide_onnx_number(const OnnxAttend* attend);

// Between passes. 1 where there is no memory, 2 for shapes that no kernel knows.
LOWTIDE_API int lowtide_onnx_set_layers(OnnxAttend* attend, const OnnxLayer* layers, int num_layers);

// The next pass has so many rows, which become cells from `num_past` on.
LOWTIDE_API void lowtide_onnx_begin(OnnxAttend* attend, int num_past, int num_rows);

// Passes from now on end with a layer, whose node fails: the session's run does, and nothing behind it is computed. The
// last one scores the layer's keys (`prompt_scores.h`). Below 0 passes go through all layers again.
LOWTIDE_API void lowtide_onnx_score_prompt(OnnxAttend* attend, int layer, const ScoreRule* rule, int is_last);

// Whether the pass that was begun last has ended so.
LOWTIDE_API int lowtide_onnx_has_ended(const OnnxAttend* attend);

// The scores of the first `size` keys; returns how many there are, and writes nothing where that is fewer.
LOWTIDE_API int lowtide_onnx_prompt_scores(const OnnxAttend* attend, float* scores, int size);

// Keys that were attended to and that a last row could see, over all layers and passes, and the scratch's bytes.
struct OnnxCounts {
    int64_t keys_read, keys_held, nodes, nanoseconds, scratch_bytes;
};
LOWTIDE_API OnnxCounts lowtide_onnx_counts(const OnnxAttend* attend);

// What a node of a graph calls. Null where none has the number.
OnnxAttend* onnx_attend_of(int64_t number);
int num_rows_of(const OnnxAttend& attend);
const OnnxLayer* layer_of(const OnnxAttend& attend, int64_t layer);
int threads_that_pay(const OnnxAttend& attend, const OnnxLayer& layer);

// Appends the rows to the layer's cache and attends. Returns what is wrong, or null.
const char* attend_rows(OnnxAttend& attend, int64_t layer, const OnnxRows& rows, Team& team);

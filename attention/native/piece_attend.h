#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"
#include "attention_problem.h"
#include "selection_rule.h"

// One attention node between the pieces of a graph: what a piece made for the rows of a pass, and the layer's
// cache. Python fills it.
//
// q (num_rows, num_heads, head_size), k and v (num_rows, num_kv_heads, head_size) and out, as q, hold `element`s,
// a row's side by side; strides of rows in bytes. The caches are (cells, num_kv_heads, head_size) of `cache_type`, f32
// or f16; the rows become cells from `num_past` on. `cosines` and `sines`, (positions, rotary_pairs) floats, turn
// queries and keys before, or are null; pairs lie side by side with `interleaved`, else half the turned channels
// apart. `mask` is that of an AttentionProblem over num_past + num_rows cells, `mask_row_stride` in bytes.
struct PieceRows {
    const char *q, *k, *v;
    char* out;
    size_t q_row_stride, k_row_stride, v_row_stride, out_row_stride;
    char *k_cache, *v_cache;
    const float *cosines, *sines;
    const char* mask;
    size_t mask_row_stride;
    const float* sinks;
    int32_t element, cache_type;
    int32_t layer, num_rows, num_past, num_heads, num_kv_heads, head_size, rotary_pairs, interleaved;
    float scale, softcap;
};

// What attends for one model. Null where there are no such kernels, or no memory or threads.
class PieceAttend;
LOWTIDE_API PieceAttend* lowtide_pieces_new(const char* kernels, int num_threads);
LOWTIDE_API void lowtide_pieces_free(PieceAttend* pieces);
LOWTIDE_API int lowtide_pieces_can_round(const PieceAttend* pieces);
LOWTIDE_API const char* lowtide_pieces_kernels(const PieceAttend* pieces);

// As for the hook in a graph: between passes. 1 where there is no memory.
LOWTIDE_API int lowtide_pieces_set_roles(PieceAttend* pieces, const uint8_t* roles, int num_layers, const SelectionRule* rule);
LOWTIDE_API void lowtide_pieces_start_pass(PieceAttend* pieces, int sparse, int refresh, int rounded);

// Appends the rows to the layer's cache and attends. 1 where there is no memory, 2 for shapes that no kernel knows.
LOWTIDE_API int lowtide_pieces_attend(PieceAttend* pieces, const PieceRows* rows);

// Keys that were attended to and that a last row could see, over all layers and passes, and the scratch's bytes.
struct PieceCounts {
    int64_t keys_read, keys_held, nanoseconds, scratch_bytes;
};
LOWTIDE_API PieceCounts lowtide_pieces_counts(const PieceAttend* pieces);

// What Python sets of a hook and asks of it, between passes.

#include <cstring>
#include <new>

#include "hook_state.h"

namespace {

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

extern "C" LayerClock* lowtide_hook_clock(GraphHook* hook) { return &hook->clock; }

extern "C" PolicyAttend* lowtide_hook_policy(GraphHook* hook) { return &hook->attend; }

extern "C" void lowtide_hook_set_active(GraphHook* hook, int active) {
    hook->active = active != 0;
    hook->attend.forget();
}

extern "C" int lowtide_hook_stream_weights(GraphHook* hook, const WeightSpan* spans, int num_spans, const uint8_t* kept,
                                           int num_groups) {
    try {
        return hook->weights.set(spans, num_spans, kept, num_groups) ? 0 : 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

extern "C" int lowtide_hook_read_packed(GraphHook* hook, const char* names, int max_rows, int max_columns) {
    try {
        return hook->packed.set(names, max_rows, max_columns, hook->num_threads) ? 0 : 1;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

extern "C" int lowtide_hook_set_parts(GraphHook* hook, int num_shared, int num_parts, const int32_t* num_rows, const int32_t* const* cells,
                                      const int32_t* num_cells) {
    return failed([=] {
        if (num_parts > 0)
            for (HookedLayer& layer : hook->layers) layer.cells.clear();
        hook->parts.set(num_shared, num_parts, num_rows, cells, num_cells);
    });
}

extern "C" int lowtide_hook_copy_cell(GraphHook* hook, int from, int to) {
    int num_copied = 0;
    for (const HookedLayer& layer : hook->layers) num_copied += layer.cells.copy(from, to);
    return num_copied;
}

extern "C" int64_t lowtide_hook_parts_refused(const GraphHook* hook) { return hook->parts.num_refused(); }

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
    const size_t scratch_bytes = hook->attend.scratch_bytes() + hook->prompt_scores.scratch_bytes() + hook->packed.scratch_bytes() + hook->parts.num_bytes();
    HookCounts counts{0, 0, hook->nodes_ours, hook->nodes_theirs, hook->nanoseconds, int64_t(scratch_bytes),
                      hook->keys_read, hook->keys_held, hook->weights.given_back_bytes(), hook->products_sliced,
                      hook->packed.num_taken(), hook->packed.num_refused()};
    for (const HookedLayer& layer : hook->layers) {
        counts.layers_ours += layer.ours && !layer.theirs;
        counts.layers_theirs += layer.theirs;
    }
    return counts;
}

extern "C" const char* lowtide_hook_kernels(const GraphHook* hook) { return hook->kernels->name; }

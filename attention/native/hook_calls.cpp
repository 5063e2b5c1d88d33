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

extern "C" void lowtide_hook_set_active(GraphHook* hook, int active) {
    hook->active = active != 0;
    hook->delta.forget(), hook->states.cut(0);
}

extern "C" int lowtide_hook_set_roles(GraphHook* hook, const uint8_t* roles, int num_layers, const SelectionRule* rule) {
    return failed([=] { hook->attend.set_roles(roles, num_layers < kMaxLayers ? num_layers : kMaxLayers, *rule); });
}

extern "C" int lowtide_hook_set_groups(GraphHook* hook, const DeltaRule* rule, const uint8_t* num_groups, const float* scales, int num_layers,
                                       int num_kv_heads, int key_size) {
    const int num_known = num_layers < kMaxLayers ? num_layers : kMaxLayers;
    bool can_be = false;
    const int failure = failed([&] { can_be = hook->delta.set_units(*rule, num_groups, scales, num_known, num_kv_heads, key_size); });
    return failure != 0 || can_be ? failure : 2;
}

extern "C" int lowtide_hook_set_states(GraphHook* hook, const StatesRule* rule, const float* thresholds, const float* shares,
                                       const float* scales, int num_layers, int num_kv_heads, int key_size) {
    const int num_known = num_layers < kMaxLayers ? num_layers : kMaxLayers;
    bool can_be = false;
    const int failure =
        failed([&] { can_be = hook->states.set_units(*rule, thresholds, shares, scales, num_known, num_kv_heads, key_size); });
    return failure != 0 || can_be ? failure : 2;
}

extern "C" void lowtide_hook_start_states(GraphHook* hook) { hook->states.start_pass(true); }

extern "C" int lowtide_hook_measure_states(GraphHook* hook) { return failed([=] { hook->states.start_measuring(); }); }

extern "C" void lowtide_hook_read_state_measures(const GraphHook* hook, float* errors, float* squares, float* shares) {
    hook->states.read_measures(errors, squares), hook->states.read_shares(shares);
}

extern "C" ScoreCounts lowtide_hook_score_counts(const GraphHook* hook) { return hook->states.counts(); }

extern "C" void lowtide_hook_start_grouped(GraphHook* hook, int grouped) { hook->delta.start_pass(grouped != 0); }

extern "C" int lowtide_hook_measure_groups(GraphHook* hook) { return failed([=] { hook->delta.start_measuring(); }); }

extern "C" void lowtide_hook_read_measures(const GraphHook* hook, float* errors, float* squares) { hook->delta.read_measures(errors, squares); }

extern "C" void lowtide_hook_cut(GraphHook* hook, int num_cells) {
    hook->delta.cut(num_cells), hook->states.cut(num_cells);
}

extern "C" int lowtide_hook_least_cells(const GraphHook* hook) { return hook->delta.least_cells(); }

extern "C" int lowtide_hook_has_lost(const GraphHook* hook) { return hook->delta.has_lost(); }

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

extern "C" void lowtide_hook_start_pass(GraphHook* hook, int sparse, int refresh, int rounded) {
    hook->attend.start_pass(sparse != 0, refresh != 0);
    hook->delta.start_pass(false), hook->states.start_pass(false);
    hook->rounded = rounded != 0;
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
    const size_t scratch_bytes = hook->attend.scratch_bytes() + hook->delta.scratch_bytes() + hook->states.scratch_bytes() +
                                 hook->prompt_scores.scratch_bytes() + hook->packed.scratch_bytes() + hook->parts.num_bytes();
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

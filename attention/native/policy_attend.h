#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"
#include "attention_problem.h"
#include "delta_attend.h"
#include "selection_rule.h"
#include "state_attend.h"
#include "team.h"
#include "tidal_attend.h"

// Attention as the policy that was set has it: over groups, over states, over chosen keys or over all of them. Where it
// runs, in llama.cpp's graph or in an ONNX graph's session, it is the same.
class PolicyAttend {
public:
    TidalAttend tidal;
    DeltaAttend delta;
    StateAttend states;
    bool rounded = false;

    void start_pass(bool sparse, bool refresh, bool may_round);

    // Makes room for the problem before any thread runs; false where there is no memory for it.
    bool reserve(const AttentionProblem& problem, int layer, int stream, int num_threads);

    // Returns the number of keys that the last row attended to.
    int run(const AttentionProblem& problem, int layer, int stream, const KernelSet& kernels, Team& team);

    // Forgets what is kept of the cells from `num_cells` on: they are other ones now.
    void cut(int num_cells) { delta.cut(num_cells), states.cut(num_cells); }

    // Keeps everything anew in passes to come.
    void forget() { delta.forget(), states.cut(0); }

    size_t scratch_bytes() const { return tidal.scratch_bytes() + delta.scratch_bytes() + states.scratch_bytes(); }
};

// TidalDecode's part of each layer (`TidalAttend::Role`) and its rule, between passes. Returns 1 where there is
// no memory. Passes are dense until one is started as sparse; `refresh` has its selection layers choose anew,
// `rounded` lets a prompt's rows be multiplied in bfloat16 where the kernels can, which is not exact.
LOWTIDE_API int lowtide_policy_set_roles(PolicyAttend* attend, const uint8_t* roles, int num_layers, const SelectionRule* rule);
LOWTIDE_API void lowtide_policy_start_pass(PolicyAttend* attend, int sparse, int refresh, int rounded);

// What DeltaAttend groups (its `set_units`), between passes; returns 1 where there is no memory, 2 where a page cannot
// have so many groups. Passes are grouped from a `start_grouped` on, up to a `start_pass`, and open groups where it says so; or are measured
// (`start_measuring`, 1 where there is no memory). Whoever changes cells in another way than by a pass says from
// which on, with a cut.
LOWTIDE_API int lowtide_policy_set_groups(PolicyAttend* attend, const DeltaRule* rule, const uint8_t* num_groups, const float* lifts,
                                          const float* scales, int num_layers, int num_kv_heads, int key_size);
LOWTIDE_API void lowtide_policy_start_grouped(PolicyAttend* attend, int opens);
LOWTIDE_API int lowtide_policy_measure_groups(PolicyAttend* attend);
LOWTIDE_API void lowtide_policy_read_group_measures(const PolicyAttend* attend, float* errors, float* squares);
LOWTIDE_API void lowtide_policy_cut(PolicyAttend* attend, int num_cells);

// The same for StateAttend, whose `set_units` says what the arrays are; what was measured comes with the share that each
// unit sent of its states. The counts are those of all passes.
LOWTIDE_API int lowtide_policy_set_states(PolicyAttend* attend, const StatesRule* rule, const float* thresholds, const float* shares,
                                          const float* scales, int num_layers, int num_kv_heads, int key_size);
LOWTIDE_API void lowtide_policy_start_states(PolicyAttend* attend, int opens);
LOWTIDE_API int lowtide_policy_measure_states(PolicyAttend* attend);
LOWTIDE_API void lowtide_policy_read_state_measures(const PolicyAttend* attend, float* errors, float* squares, float* shares);
LOWTIDE_API ScoreCounts lowtide_policy_score_counts(const PolicyAttend* attend);

// Where groups replace cells (`DeltaRule`): the fewest cells, but for none, that a cut may leave, and whether a pass
// has wanted what was given back.
LOWTIDE_API int lowtide_policy_least_cells(const PolicyAttend* attend);
LOWTIDE_API int lowtide_policy_has_lost(const PolicyAttend* attend);

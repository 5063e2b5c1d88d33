#pragma once

#include <cstdint>

#include "api.h"
#include "attention_problem.h"
#include "selection_rule.h"

// The kernels called on a problem from outside a graph, with threads of their own: for tests and measurements.
// Each returns 0, 1 where there is no such kernel set or no memory, 2 for shapes that no kernel knows.
LOWTIDE_API int lowtide_attend(const AttentionProblem* problem, const char* kernels, int num_threads);

// Attends as a selection layer does, and writes what it chose to `cells`, which has room for every key, and
// how many to `num_cells`; -1 where attention stays dense.
LOWTIDE_API int lowtide_select(const AttentionProblem* problem, const SelectionRule* rule, const char* kernels,
                               int num_threads, int32_t* cells, int32_t* num_cells);

// Attention over groups, as one layer of a pass after another: it keeps what it has grouped. Null where there is no
// memory. `num_read` is what `DeltaAttend::run` returns; the rest is as above.
class DeltaAttend;
struct DeltaRule;
LOWTIDE_API DeltaAttend* lowtide_delta_new(const DeltaRule* rule, const uint8_t* num_groups, const float* lifts,
                                           const float* scales, int num_kv_heads, int key_size);
LOWTIDE_API int lowtide_delta_attend(DeltaAttend* delta, const AttentionProblem* problem, const char* kernels, int num_threads,
                                     int* num_read);
LOWTIDE_API void lowtide_delta_free(DeltaAttend* delta);

// The same over states. `counts` are those of all passes up to this one; a pass that is not taken adds nothing.
class StateAttend;
struct StatesRule;
struct ScoreCounts;
LOWTIDE_API StateAttend* lowtide_states_new(const StatesRule* rule, const float* thresholds, const float* shares, const float* scales,
                                            int num_kv_heads, int key_size);
LOWTIDE_API int lowtide_states_attend(StateAttend* states, const AttentionProblem* problem, const char* kernels, int num_threads,
                                      ScoreCounts* counts);
LOWTIDE_API void lowtide_states_free(StateAttend* states);

#include "policy_attend.h"

#include <new>

namespace {

// Does the work; 1 where there is no memory for it, 2 where it says no.
template <class Work> int failed(const Work& work) {
    try {
        return work() ? 0 : 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

void PolicyAttend::start_pass(bool sparse, bool refresh, bool may_round) {
    tidal.start_pass(sparse, refresh);
    delta.start_pass(false), states.start_pass(false);
    rounded = may_round;
}

bool PolicyAttend::reserve(const AttentionProblem& p, int layer, int stream, int num_threads) {
    return tidal.reserve(p, layer, num_threads) && delta.reserve(p, layer, stream, num_threads) &&
           states.reserve(p, layer, stream, num_threads);
}

int PolicyAttend::run(const AttentionProblem& p, int layer, int stream, const KernelSet& kernels, Team& team) {
    int num_read = delta.run(p, layer, stream, kernels, team);
    if (num_read == DeltaAttend::kNotTaken) num_read = states.run(p, layer, stream, kernels, team);
    if (num_read != StateAttend::kNotTaken) return num_read;
    num_read = tidal.run(p, layer, kernels, team);
    if (delta.is_measuring() || states.is_measuring()) team.once([&] { delta.measure(p, layer), states.measure(p, layer); });
    return num_read;
}

extern "C" int lowtide_policy_set_roles(PolicyAttend* attend, const uint8_t* roles, int num_layers, const SelectionRule* rule) {
    return failed([=] { return attend->tidal.set_roles(roles, num_layers, *rule), true; });
}

extern "C" void lowtide_policy_start_pass(PolicyAttend* attend, int sparse, int refresh, int rounded) {
    attend->start_pass(sparse != 0, refresh != 0, rounded != 0);
}

extern "C" int lowtide_policy_set_groups(PolicyAttend* attend, const DeltaRule* rule, const uint8_t* num_groups, const float* lifts,
                                         const float* scales, int num_layers, int num_kv_heads, int key_size) {
    return failed([=] { return attend->delta.set_units(*rule, num_groups, lifts, scales, num_layers, num_kv_heads, key_size); });
}

extern "C" void lowtide_policy_start_grouped(PolicyAttend* attend, int opens) { attend->delta.start_pass(true, opens != 0); }

extern "C" int lowtide_policy_measure_groups(PolicyAttend* attend) {
    return failed([=] { return attend->delta.start_measuring(), true; });
}

extern "C" void lowtide_policy_read_group_measures(const PolicyAttend* attend, float* errors, float* squares) {
    attend->delta.read_measures(errors, squares);
}

extern "C" void lowtide_policy_cut(PolicyAttend* attend, int num_cells) { attend->cut(num_cells); }

extern "C" int lowtide_policy_set_states(PolicyAttend* attend, const StatesRule* rule, const float* thresholds, const float* shares,
                                         const float* scales, int num_layers, int num_kv_heads, int key_size) {
    return failed([=] { return attend->states.set_units(*rule, thresholds, shares, scales, num_layers, num_kv_heads, key_size); });
}

extern "C" void lowtide_policy_start_states(PolicyAttend* attend, int opens) { attend->states.start_pass(true, opens != 0); }

extern "C" int lowtide_policy_measure_states(PolicyAttend* attend) {
    return failed([=] { return attend->states.start_measuring(), true; });
}

extern "C" void lowtide_policy_read_state_measures(const PolicyAttend* attend, float* errors, float* squares, float* shares) {
    attend->states.read_measures(errors, squares), attend->states.read_shares(shares);
}

extern "C" ScoreCounts lowtide_policy_score_counts(const PolicyAttend* attend) { return attend->states.counts(); }

extern "C" int lowtide_policy_least_cells(const PolicyAttend* attend) { return attend->delta.least_cells(); }

extern "C" int lowtide_policy_has_lost(const PolicyAttend* attend) { return attend->delta.has_lost(); }

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "attention_problem.h"
#include "barrier.h"
#include "key_set.h"
#include "selection_rule.h"
#include "team.h"

// TidalDecode (arXiv 2410.05076, section 3): some layers attend to every key and choose a few by weight; the
// layers after them attend to those alone. One set serves all heads and all rows of a pass.
class TidalAttend {
public:
    // What a layer does in a sparse pass. `reuse` takes the set of the nearest `select` layer before it and
    // is dense where there is none, or none for the layer's own cache.
    enum class Role : uint8_t { dense, select, reuse };

    // Between passes only; throws std::bad_alloc.
    void set_roles(const uint8_t* roles, int num_layers, const SelectionRule& rule);

    // Whether the passes from now on are sparse, and whether their selection layers choose anew.
    void start_pass(bool sparse, bool refresh);

    // As for Attend, which does the attending.
    bool reserve(const AttentionProblem& problem, int layer, int num_threads);

    // Returns the number of keys that were attended to.
    int run(AttentionProblem problem, int layer, const KernelSet& kernels, Team& team);
    int run(AttentionProblem problem, int layer, const KernelSet& kernels, int thread, int num_threads);

    // Several problems, densely.
    bool reserve_many(const AttentionProblem& problem, int num_threads) { return attend_.reserve_many(problem, num_threads); }
    void run_many(const AttentionProblem* problems, int count, const KernelSet& kernels, int thread, int num_threads) {
        attend_.run_many(problems, count, kernels, thread, num_threads);
    }

    // The set that a layer of this role made or used last.
    const KeySet* set_of(int layer) const;

    size_t scratch_bytes() const;

private:
    Role role_now(const AttentionProblem& problem, int layer) const;
    void select(AttentionProblem problem, KeySet& set, const KernelSet& kernels, Team& team);
    void weigh(const AttentionProblem& problem, const KernelSet& kernels, int thread, int num_workers);
    int reuse(AttentionProblem problem, const KeySet& set, const KernelSet& kernels, Team& team);

    Attend attend_;
    Barrier barrier_;
    SelectionRule rule_{};
    std::vector<Role> roles_;
    std::vector<int> set_of_layer_;
    std::vector<KeySet> sets_;
    std::vector<float> scores_, totals_, weights_;
    bool sparse_ = false, refresh_ = true;
};

#pragma once

// TidalDecode (arXiv 2410.05076, section 3): a few layers attend to all keys and select the top ones; the layers
// after them attend to those alone.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/problem.h"
#include "c_api.h"
#include "sparse/policy.h"
#include "threads.h"

// How many keys a sparse layer attends to. Python fills it in.
struct SelectionRule {
    int32_t num_keys;  // in all; if it is 0, `fraction` of the visible keys
    float fraction;
    int32_t num_sink_tokens;  // each token's first visible keys are always selected
    int32_t num_recent;       // and its last ones, its own among them
    int32_t min_visible;      // up to so many visible keys, attention is dense

    // All visible keys if attention is to be dense.
    int budget(int num_visible) const {
        const int target = num_keys > 0 ? num_keys : int(std::ceil(fraction * float(num_visible)));
        return target >= num_visible || num_visible <= min_visible ? num_visible : target;
    }
};

// The keys that a selection layer selected: one set for all heads and tokens.
class SelectedKeys {
public:
    // Reserves room for a cache of that many slots. Throws std::bad_alloc.
    void reserve(int num_slots);

    // Selects the keys of the largest weights, (num_keys) floats, beside the sink and recent tokens. Of equal weights
    // the earlier key is selected. Called by one thread.
    void select(const AttentionProblem& problem, const SelectionRule& rule, const float* weights);

    // Keeps the last top-k keys and takes the sink and recent tokens of this problem.
    void update_window(const AttentionProblem& problem, const SelectionRule& rule);

    // Selects all visible keys: there are too few to choose from.
    void select_all(const AttentionProblem& problem);

    // The next pass has other tokens. Without top-k keys it has to select again.
    void expire() { mask_ = nullptr; }
    void clear() { top_k_.clear(), expire(); }
    bool has_top_k() const { return !top_k_.empty(); }

    // Whether the selection was made for these tokens and slots. A layer with another cache (a sliding window) has
    // another mask.
    bool matches(const AttentionProblem& p) const { return mask_ == p.mask && num_keys_ == p.num_keys && num_tokens_ == p.num_tokens; }
    bool is_all() const { return is_all_; }
    const std::vector<int32_t>& slots() const { return slots_; }

    size_t num_bytes() const;

private:
    void bind(const AttentionProblem& problem);
    int mark(const AttentionProblem& problem, const SelectionRule& rule);
    void mark_top_k(int k, const float* weights);
    void collect_slots();

    std::vector<int32_t> slots_, top_k_;
    std::vector<uint8_t> marks_;
    std::vector<uint32_t> candidates_;
    const char* mask_ = nullptr;
    int num_keys_ = 0, num_tokens_ = 0, num_forced_ = 0;
    bool is_all_ = false;
};

// Which layers select, and what they selected. The policy skips dense layers, and all layers without roles.
class TidalPolicy : public SparsePolicy {
public:
    using SparsePolicy::SparsePolicy;

    // What a layer does in a sparse pass. `reuse` attends to the selection of the nearest `select` layer before it.
    // It is dense if there is none, or none for the layer's own cache.
    enum class LayerRole : uint8_t { dense, select, reuse };

    // Between forward passes only. Throws std::bad_alloc.
    void set_roles(const uint8_t* roles, int num_layers, const SelectionRule& rule);

    void start_pass(const PassOptions& options) override;
    bool reserve(const AttentionProblem& problem, int layer, int stream, int num_threads) override;
    int run(const AttentionProblem& problem, int layer, int stream, const AttentionKernels& kernels, ThreadGroup& threads) override;
    void truncate(int /* num_slots */) override {}  // a selection is for one pass, or has to match the next one
    size_t scratch_bytes() const override;

    // The selection that layer `layer`, a `select` or `reuse` layer with one before it, made or used last.
    const SelectedKeys& selection_of(int layer) const { return selections_[selection_index_[layer]]; }

private:
    LayerRole current_role(const AttentionProblem& problem, int layer) const;
    int select(AttentionProblem problem, SelectedKeys& selection, const AttentionKernels& kernels, ThreadGroup& threads);
    void accumulate(const AttentionProblem& problem, const AttentionKernels& kernels, int thread, int num_workers);
    int reuse(AttentionProblem problem, const SelectedKeys& selection, const AttentionKernels& kernels, ThreadGroup& threads);

    SelectionRule rule_{};
    std::vector<LayerRole> roles_;
    std::vector<int> selection_index_;
    std::vector<SelectedKeys> selections_;
    std::vector<float> scores_, softmax_stats_, weights_;
    bool is_sparse_ = false, refresh_ = true;
};

// Makes TidalDecode the current policy, with the role of each layer (`TidalPolicy::LayerRole`) and its rule. Returns 1
// if there is no memory.
LOWTIDE_API int lowtide_policy_set_roles(CurrentPolicy* policy, const uint8_t* roles, int num_layers, const SelectionRule* rule);

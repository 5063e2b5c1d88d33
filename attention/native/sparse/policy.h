#pragma once

// The interface of sparse attention policies, and the current policy of a graph. It is the same in llama.cpp's graph
// and in an ONNX graph.
//
// A policy is one pair of files here and one line of sources.txt. Its C functions, in the same files, make it current
// (`CurrentPolicy::configure`); everything else reaches it through the interface.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "attention/flash.h"
#include "attention/problem.h"
#include "c_api.h"
#include "threads.h"

// What the forward passes do from now on.
struct PassOptions {
    bool sparse = false;  // whether the policy is on; without it, attention is dense
    bool refresh = true;  // whether layers that select keys select again (TidalPolicy)
    bool refine = false;  // whether the policy refines scores by its rule
};

// Attention that leaves out or approximates keys. Passes call `reserve` and `run` for each node, in the order of
// layers; the other functions are called between passes. `stream` is the part of the cache that the node reads.
class SparsePolicy {
public:
    // The result of `run` if the policy leaves the node to dense attention.
    static constexpr int kSkipped = -1;

    explicit SparsePolicy(FlashAttention& flash) : flash_(flash) {}
    virtual ~SparsePolicy() = default;
    SparsePolicy(const SparsePolicy&) = delete;
    SparsePolicy& operator=(const SparsePolicy&) = delete;

    virtual void start_pass(const PassOptions& options) = 0;

    // Allocates scratch before the threads run, that of FlashAttention included. Returns false if there is no memory.
    virtual bool reserve(const AttentionProblem& problem, int layer, int stream, int num_threads) = 0;

    // Returns the number of keys that the last token attended to, or kSkipped. It is called while the policy is off,
    // too, so that it learns which slots are written.
    virtual int run(const AttentionProblem& problem, int layer, int stream, const AttentionKernels& kernels, ThreadGroup& threads) = 0;

    // Drops what is stored beside the cache for the slots from `num_slots` on.
    virtual void truncate(int num_slots) = 0;
    void clear() { truncate(0); }

    // While the policy measures its errors, it skips every node, and `measure` compares its result with that of dense
    // attention in `problem.out`. Called by one thread.
    virtual bool is_measuring() const { return false; }
    virtual void measure(const AttentionProblem&, int /* layer */) {}

    // Of the policy alone, without FlashAttention.
    virtual size_t scratch_bytes() const = 0;

protected:
    FlashAttention& flash_;
};

// The attention of a graph: the current policy, if there is one, and dense attention for the nodes that it skips.
class CurrentPolicy {
public:
    bool use_bf16 = false;  // whether the tokens of a prompt may be multiplied in bfloat16

    // Makes a policy of that class current, unless it is current already, and calls `configure(policy)`. Returns 0; 1
    // if there is no memory; 2 if `configure` returns false, and then the current policy does not change.
    template <class Policy, class Configure> int configure(const Configure& configure) {
        return error_code([&] {
            if (Policy* current = find<Policy>()) return configure(*current);
            auto policy = std::make_unique<Policy>(flash_);
            if (!configure(*policy)) return false;
            policy_ = std::move(policy);
            return true;
        });
    }

    // The current policy if it is of that class, else null.
    template <class Policy> Policy* find() const { return dynamic_cast<Policy*>(policy_.get()); }

    // As in SparsePolicy. `run` runs dense attention if the policy skips the node.
    void start_pass(const PassOptions& options);
    bool reserve(const AttentionProblem& problem, int layer, int stream, int num_threads);
    int run(const AttentionProblem& problem, int layer, int stream, const AttentionKernels& kernels, ThreadGroup& threads);
    void truncate(int num_slots);
    void clear() { truncate(0); }
    size_t scratch_bytes() const;

    // Dense attention. It shares its scratch with the policy.
    FlashAttention& dense() { return flash_; }

private:
    FlashAttention flash_;
    std::unique_ptr<SparsePolicy> policy_;
};

// Starts passes: they are dense unless `sparse`; `refresh` has selection layers select again; `use_bf16` lets the
// tokens of a prompt be multiplied in bfloat16 if the kernels can, which is not exact.
LOWTIDE_API void lowtide_policy_start_pass(CurrentPolicy* policy, int sparse, int refresh, int use_bf16);

// Whoever changes KV slots in another way than by a forward pass calls `truncate`: the slots from `num_slots` on have
// changed.
LOWTIDE_API void lowtide_policy_truncate(CurrentPolicy* policy, int num_slots);

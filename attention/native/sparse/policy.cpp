// Dispatches nodes to the current policy, or to dense attention.

#include "sparse/policy.h"

void CurrentPolicy::start_pass(const PassOptions& options) {
    if (policy_ != nullptr) policy_->start_pass(options);
}

bool CurrentPolicy::reserve(const AttentionProblem& p, int layer, int stream, int num_threads) {
    return flash_.reserve(p, num_threads) && (policy_ == nullptr || policy_->reserve(p, layer, stream, num_threads));
}

int CurrentPolicy::run(const AttentionProblem& p, int layer, int stream, const AttentionKernels& kernels, ThreadGroup& threads) {
    const int num_read = policy_ == nullptr ? SparsePolicy::kSkipped : policy_->run(p, layer, stream, kernels, threads);
    if (num_read != SparsePolicy::kSkipped) return num_read;
    flash_.run(p, kernels, threads);
    if (policy_ != nullptr && policy_->is_measuring()) threads.single([&] { policy_->measure(p, layer); });
    return p.num_keys;
}

void CurrentPolicy::truncate(int num_slots) {
    if (policy_ != nullptr) policy_->truncate(num_slots);
}

size_t CurrentPolicy::scratch_bytes() const { return flash_.scratch_bytes() + (policy_ == nullptr ? 0 : policy_->scratch_bytes()); }

extern "C" void lowtide_policy_start_pass(CurrentPolicy* policy, int sparse, int refresh, int use_bf16) {
    policy->use_bf16 = use_bf16 != 0;
    policy->start_pass({sparse != 0, refresh != 0, false});
}

extern "C" void lowtide_policy_truncate(CurrentPolicy* policy, int num_slots) { policy->truncate(num_slots); }

// Runs the kernels on threads of its own for each call.

#include "kernel_calls.h"

#include <algorithm>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "matmul/matmul.h"
#include "matmul/repack.h"

namespace {

bool is_known_shape(const AttentionProblem& p) {
    const auto is_known_dim = [](int dim) { return dim > 0 && dim <= kMaxHeadDim && dim % 16 == 0; };
    return p.num_tokens > 0 && p.num_keys > 0 && p.num_kv_heads > 0 && p.num_heads > 0 && p.num_heads % p.num_kv_heads == 0 &&
           is_known_dim(p.key_dim) && is_known_dim(p.value_dim);
}

// Calls `work(thread)` on `num_threads` threads.
template <class Work> void run_threads(int num_threads, const Work& work) {
    std::vector<std::thread> threads;
    for (int i = 1; i < num_threads; ++i) threads.emplace_back([&, i] { work(i); });
    work(0);
    for (std::thread& thread : threads) thread.join();
}

// Checks the arguments of an attention call, reserves scratch with `reserve()` and calls `run(kernels, threads)`
// on each thread.
template <class Reserve, class Run>
int attend_on_threads(const AttentionProblem& problem, const char* name, int num_threads, const Reserve& reserve, const Run& run) {
    const AttentionKernels* kernels = find_attention_kernels(name);
    if (kernels == nullptr) return 1;
    if (!is_known_shape(problem) || num_threads < 1) return 2;
    if (!reserve()) return 1;
    Barrier barrier;
    run_threads(num_threads, [&](int thread) {
        BarrierThreadGroup threads(barrier, thread, num_threads);
        run(*kernels, threads);
    });
    return 0;
}

int attend_with(CurrentPolicy& policy, const AttentionProblem& problem, const char* kernels, int num_threads) {
    return attend_on_threads(
        problem, kernels, num_threads, [&] { return policy.reserve(problem, 0, 0, num_threads); },
        [&](const AttentionKernels& found, ThreadGroup& threads) { policy.run(problem, 0, 0, found, threads); });
}

// Makes a layer with its policy on; null for an invalid rule or if there is no memory.
template <class Layer, class Configure> Layer* new_layer(const Configure& configure) {
    std::unique_ptr<Layer> layer(new (std::nothrow) Layer());
    if (layer == nullptr) return nullptr;
    try {
        layer->policy.start_pass({true, true, true});
        return configure(layer->policy) ? layer.release() : nullptr;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

bool is_valid(const RepackedMatrix& matrix) {
    return matrix.tiles != nullptr && lowtide_repacked_bytes(matrix.format, matrix.num_rows, matrix.num_columns) != 0;
}

bool have_same_shape(const RepackedMatrix& a, const RepackedMatrix& b) {
    return a.format == b.format && a.num_rows == b.num_rows && a.num_columns == b.num_columns;
}

}  // namespace

struct DeltaRowsLayer {
    FlashAttention flash;
    DeltaRowsPolicy policy{flash};
};

struct DeltaBlocksLayer {
    FlashAttention flash;
    DeltaBlocksPolicy policy{flash};
};

extern "C" size_t lowtide_test_problem_bytes() { return sizeof(AttentionProblem); }

extern "C" int lowtide_test_attend(const AttentionProblem* problem, const char* kernels, int num_threads) {
    CurrentPolicy dense;
    return attend_with(dense, *problem, kernels, num_threads);
}

extern "C" int lowtide_test_select(const AttentionProblem* problem, const SelectionRule* rule, const char* kernels, int num_threads,
                                   int32_t* slots, int32_t* num_slots) {
    CurrentPolicy policy;
    const uint8_t role = uint8_t(TidalPolicy::LayerRole::select);
    if (lowtide_policy_set_roles(&policy, &role, 1, rule) != 0) return 1;
    policy.start_pass({true, true, false});
    const int error = attend_with(policy, *problem, kernels, num_threads);
    if (error != 0) return error;
    const SelectedKeys& selection = policy.find<TidalPolicy>()->selection_of(0);
    *num_slots = selection.is_all() ? -1 : int32_t(selection.slots().size());
    if (!selection.is_all()) std::copy(selection.slots().begin(), selection.slots().end(), slots);
    return 0;
}

extern "C" DeltaRowsLayer* lowtide_test_delta_rows_new(const DeltaRowsRule* rule, const uint8_t* num_clusters, const float* score_bias,
                                                        const float* scales, int num_kv_heads, int key_dim) {
    return new_layer<DeltaRowsLayer>(
        [=](DeltaRowsPolicy& policy) { return policy.set_head_params(*rule, num_clusters, score_bias, scales, 1, num_kv_heads, key_dim); });
}

extern "C" int lowtide_test_delta_rows_attend(DeltaRowsLayer* layer, const AttentionProblem* problem, const char* kernels,
                                              int num_threads, int* num_read) {
    return attend_on_threads(
        *problem, kernels, num_threads, [=] { return layer->policy.reserve(*problem, 0, 0, num_threads); },
        [=](const AttentionKernels& found, ThreadGroup& threads) {
            const int read = layer->policy.run(*problem, 0, 0, found, threads);
            threads.single([=] { *num_read = read; });
        });
}

extern "C" void lowtide_test_delta_rows_free(DeltaRowsLayer* layer) { delete layer; }

extern "C" DeltaBlocksLayer* lowtide_test_delta_blocks_new(const DeltaBlocksRule* rule, const float* thresholds, const float* max_shares,
                                                            const float* scales, int num_kv_heads, int key_dim) {
    return new_layer<DeltaBlocksLayer>(
        [=](DeltaBlocksPolicy& policy) { return policy.set_head_params(*rule, thresholds, max_shares, scales, 1, num_kv_heads, key_dim); });
}

extern "C" int lowtide_test_delta_blocks_attend(DeltaBlocksLayer* layer, const AttentionProblem* problem, const char* kernels,
                                                int num_threads, ScoreCounts* counts) {
    const int error = attend_on_threads(
        *problem, kernels, num_threads, [=] { return layer->policy.reserve(*problem, 0, 0, num_threads); },
        [=](const AttentionKernels& found, ThreadGroup& threads) { layer->policy.run(*problem, 0, 0, found, threads); });
    if (error == 0) *counts = layer->policy.counts();
    return error;
}

extern "C" void lowtide_test_delta_blocks_free(DeltaBlocksLayer* layer) { delete layer; }

extern "C" int lowtide_test_multiply(const RepackedMatrix* matrices, int num_matrices, const float* rows, int num_rows, float* out,
                                     const char* kernels, int num_threads) {
    if (num_matrices < 1 || num_rows < 1 || num_threads < 1) return 2;
    const RepackedMatrix& first = matrices[0];
    for (int i = 0; i < num_matrices; ++i)
        if (!is_valid(matrices[i]) || !have_same_shape(matrices[i], first)) return 2;
    const MatmulKernels* found = find_matmul_kernels(kernels);
    Matmul matmul;
    if (found == nullptr || !matmul.reserve(num_rows, first.num_columns, num_threads)) return 1;
    const size_t out_size = size_t(num_rows) * size_t(first.num_rows);
    run_threads(num_threads, [&](int thread) {
        for (int i = 0; i < num_matrices; ++i) {
            const MatmulTarget target{matrices[i], out + size_t(i) * out_size, size_t(first.num_rows)};
            matmul.run(&target, 1, rows, size_t(first.num_columns), num_rows, *found, nullptr, thread, num_threads);
        }
    });
    return 0;
}

extern "C" int lowtide_test_dequantise_row(const RepackedMatrix* matrix, int row, float* out) {
    if (!is_valid(*matrix) || row < 0 || row >= matrix->num_rows) return 2;
    dequantise_row(*matrix, row, out);
    return 0;
}

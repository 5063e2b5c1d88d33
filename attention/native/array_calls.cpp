#include "array_calls.h"

#include <algorithm>
#include <new>
#include <thread>
#include <vector>

#include "delta_attend.h"
#include "state_attend.h"
#include "tidal_attend.h"

namespace {

bool known_shape(const AttentionProblem& p) {
    const auto sized = [](int size) { return size > 0 && size <= kMaxHeadSize && size % 16 == 0; };
    return p.num_rows > 0 && p.num_keys > 0 && p.num_kv_heads > 0 && p.num_heads > 0 && p.num_heads % p.num_kv_heads == 0 &&
           sized(p.key_size) && sized(p.value_size);
}

// Runs `of_thread(i, kernels)` on so many threads.
template <class OfThread> void run_threads(int num_threads, const OfThread& of_thread) {
    std::vector<std::thread> threads;
    for (int i = 1; i < num_threads; ++i) threads.emplace_back([&, i] { of_thread(i); });
    of_thread(0);
    for (std::thread& thread : threads) thread.join();
}

int run_alone(TidalAttend& attend, const AttentionProblem& problem, const char* kernels, int num_threads) {
    const KernelSet* found = find_kernels(kernels);
    if (found == nullptr) return 1;
    if (!known_shape(problem) || num_threads < 1) return 2;
    if (!attend.reserve(problem, 0, num_threads)) return 1;
    run_threads(num_threads, [&](int thread) { attend.run(problem, 0, *found, thread, num_threads); });
    return 0;
}

}  // namespace

extern "C" int lowtide_attend(const AttentionProblem* problem, const char* kernels, int num_threads) {
    TidalAttend attend;
    return run_alone(attend, *problem, kernels, num_threads);
}

extern "C" int lowtide_select(const AttentionProblem* problem, const SelectionRule* rule, const char* kernels, int num_threads,
                              int32_t* cells, int32_t* num_cells) {
    TidalAttend attend;
    const uint8_t role = uint8_t(TidalAttend::Role::select);
    attend.set_roles(&role, 1, *rule);
    attend.start_pass(true, true);
    const int failure = run_alone(attend, *problem, kernels, num_threads);
    if (failure != 0) return failure;
    const KeySet& set = *attend.set_of(0);
    *num_cells = set.is_all() ? -1 : int32_t(set.cells().size());
    if (!set.is_all()) std::copy(set.cells().begin(), set.cells().end(), cells);
    return 0;
}

extern "C" DeltaAttend* lowtide_delta_new(const DeltaRule* rule, const uint8_t* num_groups, const float* lifts, const float* scales,
                                          int num_kv_heads, int key_size) {
    auto* delta = new (std::nothrow) DeltaAttend();
    if (delta == nullptr) return nullptr;
    try {
        delta->start_pass(true, true);
        if (delta->set_units(*rule, num_groups, lifts, scales, 1, num_kv_heads, key_size)) return delta;
    } catch (const std::bad_alloc&) {
    }
    delete delta;
    return nullptr;
}

extern "C" int lowtide_delta_attend(DeltaAttend* delta, const AttentionProblem* problem, const char* kernels, int num_threads,
                                    int* num_read) {
    const KernelSet* found = find_kernels(kernels);
    if (found == nullptr) return 1;
    if (!known_shape(*problem) || num_threads < 1) return 2;
    if (!delta->reserve(*problem, 0, 0, num_threads)) return 1;
    run_threads(num_threads, [&](int thread) {
        const int read = delta->run(*problem, 0, 0, *found, thread, num_threads);
        if (thread == 0) *num_read = read;
    });
    return 0;
}

extern "C" void lowtide_delta_free(DeltaAttend* delta) { delete delta; }

extern "C" StateAttend* lowtide_states_new(const StatesRule* rule, const float* thresholds, const float* shares, const float* scales,
                                           int num_kv_heads, int key_size) {
    auto* states = new (std::nothrow) StateAttend();
    if (states == nullptr) return nullptr;
    try {
        states->start_pass(true, true);
        if (states->set_units(*rule, thresholds, shares, scales, 1, num_kv_heads, key_size)) return states;
    } catch (const std::bad_alloc&) {
    }
    delete states;
    return nullptr;
}

extern "C" int lowtide_states_attend(StateAttend* states, const AttentionProblem* problem, const char* kernels, int num_threads,
                                     ScoreCounts* counts) {
    const KernelSet* found = find_kernels(kernels);
    if (found == nullptr) return 1;
    if (!known_shape(*problem) || num_threads < 1) return 2;
    if (!states->reserve(*problem, 0, 0, num_threads)) return 1;
    run_threads(num_threads, [&](int thread) { states->run(*problem, 0, 0, *found, thread, num_threads); });
    *counts = states->counts();
    return 0;
}

extern "C" void lowtide_states_free(StateAttend* states) { delete states; }

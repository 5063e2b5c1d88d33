#include "array_calls.h"

#include <algorithm>
#include <new>
#include <thread>
#include <vector>

#include "tidal_attend.h"

namespace {

bool known_shape(const AttentionProblem& p) {
    const auto sized = [](int size) { return size > 0 && size <= kMaxHeadSize && size % 16 == 0; };
    return p.num_rows > 0 && p.num_keys > 0 && p.num_kv_heads > 0 && p.num_heads > 0 && p.num_heads % p.num_kv_heads == 0 &&
           sized(p.key_size) && sized(p.value_size);
}

int run_alone(TidalAttend& attend, const AttentionProblem& problem, const char* kernels, int num_threads) {
    const KernelSet* found = find_kernels(kernels);
    if (found == nullptr) return 1;
    if (!known_shape(problem) || num_threads < 1) return 2;
    if (!attend.reserve(problem, 0, num_threads)) return 1;
    std::vector<std::thread> threads;
    for (int i = 1; i < num_threads; ++i)
        threads.emplace_back([&, i] { attend.run(problem, 0, *found, i, num_threads); });
    attend.run(problem, 0, *found, 0, num_threads);
    for (std::thread& thread : threads) thread.join();
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

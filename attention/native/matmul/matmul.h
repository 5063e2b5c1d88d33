#pragma once

// Matmuls with repacked weights over any number of threads.

#include <atomic>
#include <vector>

#include "c_api.h"
#include "matmul/kernels.h"
#include "team.h"
#include "threads.h"

// Is told when a matmul has read tiles that none of its threads will read again.
struct TileObserver {
    void (*on_read)(const void* context, const uint8_t* begin, const uint8_t* end);
    const void* context;
};

// One of the matrices that multiply the same rows. Strides are in floats.
struct MatmulTarget {
    RepackedMatrix matrix;
    float* out;
    size_t out_stride;
};

// Activations times repacked matrices, split between threads. Results do not depend on the number of threads.
class Matmul {
public:
    static constexpr int kMaxTargets = 4;

    // Allocates scratch for `num_rows` quantised rows and `num_threads` threads; rows that were quantised before are
    // lost. Call it while no thread runs. Returns false if there is no memory.
    bool reserve(int num_rows, int num_columns, int num_threads);

    // Frees the scratch, for passes of fewer rows.
    void release() { std::vector<CacheLine>().swap(memory_); }

    // Whether there is room for such a matmul.
    bool has_room(int num_rows, int num_columns) const { return quantised_bytes(num_rows, num_columns) <= scratch_bytes(); }

    // Multiplies the rows with up to kMaxTargets matrices, in one step: the rows are quantised once. Either the weights
    // of all are quantised or none. Every one of `num_threads` threads calls it with its own index `thread`. Threads
    // beyond the reserved number only wait. `observer` may be null; with one, a thread takes tiles in slices of about
    // 1 MiB.
    void run(const MatmulTarget* targets, int num_targets, const float* rows, size_t row_stride, int num_rows,
             const MatmulKernels& kernels, const TileObserver* observer, int thread, int num_threads);

    // The steps of `run` for threads that cannot wait for one another. Call `quantise` on every thread, unless the
    // weights are F16 or BF16; then `restart` once; then `multiply` on every thread, for the target of that index.
    void quantise(const float* rows, size_t row_stride, int num_rows, int num_columns, const MatmulKernels& kernels, int thread,
                  int num_threads);
    void restart(int index) { next_tiles_[index] = 0; }
    void multiply(const MatmulTarget& target, const FloatRows& rows, int index, const MatmulKernels& kernels,
                  const TileObserver* observer, int thread, int num_threads);

    // `run` for a team, called by its first thread alone. Its helpers need `aside_bytes` of the largest matmul.
    void run(const MatmulTarget* targets, int num_targets, const float* rows, size_t row_stride, int num_rows,
             const MatmulKernels& kernels, const TileObserver* observer, Team& team);
    static size_t aside_bytes(int num_rows, int num_columns);

    size_t scratch_bytes() const { return memory_.size() * sizeof(CacheLine); }

private:
    int workers_of(int num_threads) const { return num_threads < reserved_threads_ ? num_threads : reserved_threads_; }

    struct alignas(64) CacheLine {
        uint8_t bytes[64];
    };

    std::vector<CacheLine> memory_;
    int reserved_threads_ = 0;
    std::atomic<int> next_tiles_[kMaxTargets] = {};
    Barrier barrier_;
};

// Whether this build and this processor have the matmul kernels of that name. Null: any.
LOWTIDE_API int lowtide_has_matmul_kernels(const char* kernels);

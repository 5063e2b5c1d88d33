#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention_problem.h"
#include "grown.h"

// Where threads exchange what a row has seen: partials of a KV head's heads that come in and that go, and two lists of
// cells that wait to be attended to.
class ExchangeRoom {
public:
    static constexpr int kMostWaiting = kChunkKeys;

    struct OfThread {
        float *in, *out;
        int32_t *keys, *picks;  // (kMostWaiting)
    };

    // Room for the problem on so many threads; throws std::bad_alloc.
    void reserve(const AttentionProblem& p, int num_threads) {
        grow(partials_, 2 * head_floats(p) * num_threads), grow(cells_, size_t(2 * kMostWaiting) * num_threads);
    }

    OfThread of_thread(const AttentionProblem& p, int thread) {
        float* in = partials_.data() + 2 * head_floats(p) * thread;
        int32_t* keys = cells_.data() + size_t(2 * kMostWaiting) * thread;
        return {in, in + head_floats(p), keys, keys + kMostWaiting};
    }

    size_t num_bytes() const { return sizeof(float) * partials_.capacity() + sizeof(int32_t) * cells_.capacity(); }

private:
    static size_t head_floats(const AttentionProblem& p) { return size_t(p.group_size()) * partial_floats(p); }

    std::vector<float> partials_;
    std::vector<int32_t> cells_;
};

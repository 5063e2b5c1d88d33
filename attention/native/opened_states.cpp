#include "opened_states.h"

#include <cmath>

#include "half_rows.h"

namespace {

// Adds to the partials of heads what they saw of keys, with the weights that they gave them.
void add_seen(const AttentionProblem& of_row, const SeenByHeads& seen, float* partials) {
    float value[kMaxHeadSize];
    for (int i = 0; i < of_row.num_keys; ++i) {
        const int key = of_row.selected[i];
        read_row(of_row.v_type, of_row.v + key * of_row.v_key_stride, of_row.value_size, value);
        for (int head = 0; head < seen.num_heads; ++head) {
            float* partial = partials + head * partial_floats(of_row);
            partial[0] = seen.totals[2 * head];
            const float weight = std::exp(seen.scores[size_t(head) * seen.stride + key] - partial[0]);
            partial[1] += weight;
            for (int d = 0; d < of_row.value_size; ++d) partial[2 + d] += weight * value[d];
        }
    }
}

}  // namespace

void OpenedStates::reserve(const AttentionProblem& p, int num_threads) {
    watched_.reserve(1, p.num_rows, p.num_heads, p.num_keys);
    room_.reserve(p, num_threads);
}

int OpenedStates::open(const AttentionProblem& p, int num_states, int kv_head, int row, float share, const KernelSet& kernels,
                       Attend& attend, int thread) {
    const SeenByHeads seen = watched_.seen(0, row, p.num_heads, kv_head * p.group_size(), p.group_size(), share);
    const ExchangeRoom::OfThread room = room_.of_thread(p, thread);
    float *in = room.in, *out = room.out;
    int32_t* keys = room.keys;
    AttentionProblem of_keys = of_row_and_head(p, kv_head, row);
    of_keys.selected = keys, of_keys.num_keys = 0;
    int num_opened = 0;
    const auto attend_to_waiting = [&] {
        if (num_opened == 0) Attend::start(p, p.group_size(), in), Attend::start(p, p.group_size(), out);
        attend.add(of_keys, kernels, thread, in), add_seen(of_keys, seen, out);
        num_opened += of_keys.num_keys;
        of_keys.num_keys = 0;
    };
    for (int first = 0; first < num_states; first += kBlockKeys) {
        if (!seen.favour_some(first)) continue;
        if (of_keys.num_keys + kBlockKeys > ExchangeRoom::kMostWaiting) attend_to_waiting();
        const uint64_t exact = p.states->stores[kv_head].exact[first / kBlockKeys];
        for (int i = 0; i < kBlockKeys; ++i)
            if ((exact >> i & 1) == 0 && seen.favour(first + i)) keys[of_keys.num_keys++] = first + i;
    }
    if (of_keys.num_keys > 0) attend_to_waiting();
    if (num_opened > 0) seen.exchange(of_keys, out, in);
    return num_opened;
}

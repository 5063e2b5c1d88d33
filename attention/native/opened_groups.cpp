#include "opened_groups.h"

#include <algorithm>


namespace {

AttentionProblem of_groups_alone(const AttentionProblem& of_row, const KeyGroups& groups) {
    AttentionProblem own = of_row;
    own.k = reinterpret_cast<const char*>(groups.keys()), own.k_key_stride = sizeof(uint16_t) * own.key_size;
    own.v = reinterpret_cast<const char*>(groups.values()), own.v_key_stride = sizeof(uint16_t) * own.value_size;
    own.k_type = own.v_type = KvType::f16;
    own.mask = reinterpret_cast<const char*>(groups.biases());
    return own;
}

}  // namespace

void OpenedGroups::reserve(const AttentionProblem& p, int most_keys, int num_threads) {
    watched_.reserve(p.num_kv_heads, p.num_rows, p.group_size(), most_keys);
    room_.reserve(p, num_threads);
}

int OpenedGroups::open(const AttentionProblem& p, const KeyGroups& groups, int kv_head, int first_row, int row, float share,
                       const KernelSet& kernels, Attend& attend, int thread) {
    const SeenByHeads seen = watched_.seen(kv_head, row - first_row, p.group_size(), 0, p.group_size(), share);
    const ExchangeRoom::OfThread room = room_.of_thread(p, thread);
    float *in = room.in, *out = room.out;
    int32_t *keys = room.keys, *picks = room.picks;
    AttentionProblem of_keys = of_row_and_head(p, kv_head, row), of_groups = of_groups_alone(of_keys, groups);
    of_keys.selected = keys, of_groups.selected = picks;
    of_keys.num_keys = of_groups.num_keys = 0;
    int num_opened = 0;
    const auto attend_to_waiting = [&] {
        if (num_opened == 0) Attend::start(p, p.group_size(), in), Attend::start(p, p.group_size(), out);
        attend.add(of_keys, kernels, thread, in), attend.add(of_groups, kernels, thread, out);
        num_opened += of_keys.num_keys;
        of_keys.num_keys = of_groups.num_keys = 0;
    };
    for (int first = 0; first < groups.num_grouped(); first += kBlockKeys) {
        if (!seen.favour_some(first)) continue;
        for (int group = first; group < std::min(first + kBlockKeys, groups.num_grouped()); ++group) {
            const bool is_one_key = groups.biases()[group] == 0;
            if (is_one_key || !seen.favour(group)) continue;
            if (of_keys.num_keys + kPageKeys > ExchangeRoom::kMostWaiting) attend_to_waiting();
            picks[of_groups.num_keys++] = group;
            of_keys.num_keys += groups.list_keys(group, keys + of_keys.num_keys);
        }
    }
    if (of_keys.num_keys > 0) attend_to_waiting();
    if (num_opened > 0) seen.exchange(of_keys, out, in);
    return num_opened;
}

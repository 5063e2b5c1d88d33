// A pass is taken in runs of rows that have the same pages behind their windows: each run has a problem of its own
// for each KV head, whose keys are the groups of those pages and the rows behind them.

#include "delta_attend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

#include "seen_cells.h"

namespace {

// Gives whole pages back to the system, up to the one that `to` lies in. What lies before `from` went back before.
void give_back_cells(const char* base, size_t cell_bytes, int from, int to) {
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(base);
    const uintptr_t whole = (begin + page - 1) / page * page, between = (begin + from * cell_bytes) / page * page;
    const uintptr_t first = std::max(whole, between), last = (begin + to * cell_bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

// Of a run's rows, all but the window and what a page still lacks: so many rows may lie beside the groups.
int most_rows_beside(int window) { return window + 3 * kPageKeys; }

}  // namespace

bool DeltaAttend::set_units(const DeltaRule& rule, const uint8_t* num_groups, const float* lifts, const float* scales, int num_layers,
                            int num_kv_heads, int key_size) {
    const size_t num_units = size_t(num_layers) * num_kv_heads;
    const bool can_be = key_size <= kMaxHeadSize && rule.num_fixed >= 0 && rule.window >= 0 &&
                        std::all_of(num_groups, num_groups + num_units, [&](int n) { return n > rule.num_fixed && n <= kPageKeys; });
    if (!can_be) return false;
    rule_ = rule, num_kv_heads_ = num_kv_heads, key_size_ = key_size;
    num_groups_.assign(num_groups, num_groups + num_units);
    lifts_.assign(lifts, lifts + num_units), scales_.assign(scales, scales + num_units * key_size);
    layers_.clear(), layers_.resize(num_layers);
    for (int layer = 0; layer < num_layers; ++layer)
        for (int head = 0; head < num_kv_heads; ++head) layers_[layer].is_grouped |= num_groups_[layer * num_kv_heads + head] < kPageKeys;
    return true;
}

void DeltaAttend::cut(int num_cells) {
    for (Layer& layer : layers_) {
        for (auto& heads : layer.streams)
            for (KeyGroups& groups : heads) groups.cut(num_cells);
        if (num_cells == 0) layer.num_given_back = 0;
    }
    if (num_cells == 0) has_lost_ = false;
}

void DeltaAttend::forget() {
    for (Layer& layer : layers_)
        for (auto& heads : layer.streams)
            for (KeyGroups& groups : heads) groups.cut(0);
}

int DeltaAttend::least_cells() const {
    int most = 0;
    for (const Layer& layer : layers_) most = std::max(most, layer.num_given_back);
    return most == 0 ? 0 : most + rule_.window - 1;
}

// Whether the groups of a layer, cut to the `first` cells, and the cache together have every cell that passes from
// there on may read.
bool DeltaAttend::holds(const Layer& layer, int stream, int first) const {
    const int given_back = layer.num_given_back;
    if (given_back == 0) return true;
    if (!grouped_ || num_pages_before(first) * kPageKeys < given_back || stream >= int(layer.streams.size())) return false;
    const auto& heads = layer.streams[stream];
    return std::all_of(heads.begin(), heads.end(), [=](const KeyGroups& groups) { return groups.num_grouped_cells() >= given_back; });
}

// All but a page of what groups stand for behind the window of the row at `first`: rows before it may be taken off.
void DeltaAttend::give_back(const AttentionProblem& p, Layer& layer, int stream, int first) {
    int end = (num_pages_before(first) - 1) * kPageKeys;
    for (const KeyGroups& groups : layer.streams[stream]) end = std::min(end, groups.num_grouped_cells());
    const bool side_by_side = p.k_head_stride * p.num_kv_heads == p.k_key_stride && p.v_head_stride * p.num_kv_heads == p.v_key_stride;
    if (layer.streams.size() != 1 || !side_by_side || end <= layer.num_given_back) return;
    give_back_cells(p.k, p.k_key_stride, layer.num_given_back, end);
    give_back_cells(p.v, p.v_key_stride, layer.num_given_back, end);
    layer.num_given_back = end;
}

bool DeltaAttend::knows(const AttentionProblem& p, int layer) const {
    return layer < int(layers_.size()) && layers_[layer].is_grouped && p.num_kv_heads == num_kv_heads_ && p.key_size == key_size_;
}

// Where the node is not ours, the cells that it writes are forgotten all the same.
bool DeltaAttend::takes(const AttentionProblem& p, int layer, int stream) {
    const int first = first_ = first_position(p);
    const bool known = first >= 0;
    Layer& own = layers_[layer];
    if (first == 0) own.num_given_back = 0;
    if (stream < int(own.streams.size()))
        for (KeyGroups& groups : own.streams[stream]) groups.cut(known ? first : 0);
    const bool is_taken = known && grouped_, is_lost = !holds(own, stream, first);
    has_lost_ |= is_lost;
    if (is_taken && rule_.replaces != 0 && !measures_.is_on() && !is_lost) give_back(p, own, stream, first);
    return is_taken;
}

bool DeltaAttend::reserve(const AttentionProblem& p, int layer, int stream, int num_threads) {
    if (!grouped_ || !knows(p, layer)) return true;
    auto& streams = layers_[layer].streams;
    const int num_cells = padded_to_cells(p.num_keys), num_beside = std::min(most_rows_beside(rule_.window), num_cells);
    AttentionProblem largest = p;
    largest.num_kv_heads = 1, largest.num_heads = p.group_size();
    largest.num_keys = num_cells;
    try {
        if (int(streams.size()) <= stream) streams.resize(stream + 1);
        if (streams[stream].empty()) streams[stream].resize(num_kv_heads_);
        size_t most_keys = 0;
        for (int head = 0; head < num_kv_heads_; ++head) {
            const int num_groups = num_groups_[layer * num_kv_heads_ + head];
            streams[stream][head].reserve(p, num_groups, num_cells, num_beside);
            most_keys = std::max(most_keys, size_t(num_cells / kPageKeys) * num_groups + num_beside);
        }
        measures_.reserve(p);
        if (is_opening()) opened_.reserve(p, int(most_keys), num_threads);
        const size_t mask_size = most_keys * std::min(p.num_rows, kPageKeys);
        if (mask_.size() < mask_size) mask_.reserve(mask_size), mask_.resize(mask_size);
        largest.num_keys = int(std::max(size_t(largest.num_keys), most_keys));
    } catch (const std::bad_alloc&) {
        return false;
    }
    // A run may have few rows where the pass has many.
    largest.num_rows = std::min(p.num_rows, 8);
    if (!attend_.reserve(largest, num_threads)) return false;
    largest.num_rows = p.num_rows;
    return attend_.reserve(largest, num_threads);
}

GroupRule DeltaAttend::rule_of(const AttentionProblem& p, int layer, int kv_head) const {
    const int unit = layer * num_kv_heads_ + kv_head;
    return {num_groups_[unit], rule_.num_fixed, lifts_[unit] * p.scale * p.scale, scales_.data() + size_t(unit) * key_size_};
}

int DeltaAttend::num_pages_before(int position) const { return std::max(position + 1 - rule_.window, 0) / kPageKeys; }

int DeltaAttend::run(const AttentionProblem& p, int layer, int stream, const KernelSet& kernels, int thread, int num_threads) {
    ThreadOfTeam team(barrier_, thread, num_threads);
    return run(p, layer, stream, kernels, team);
}

int DeltaAttend::run(const AttentionProblem& p, int layer, int stream, const KernelSet& kernels, Team& team) {
    if (!knows(p, layer)) return kNotTaken;
    team.once([&] { taken_ = takes(p, layer, stream), num_opened_ = 0; });
    if (!taken_) return kNotTaken;
    auto& heads = layers_[layer].streams[stream];
    const int first = first_;
    const int most_rows = is_opening() ? WatchedScores::kMostRows : kPageKeys;
    for (int row = 0, end = 0; row < p.num_rows; row = end) {
        const int num_pages = num_pages_before(first + row);
        while (end < p.num_rows && num_pages_before(first + end) == num_pages && end - row < most_rows) ++end;
        const auto advance = [&](int thread) {
            for (int head = thread; head < num_kv_heads_; head += team.num_threads)
                heads[head].advance(p, head, rule_of(p, layer, head), num_pages, first + end);
        };
        team.all(advance, [&] { ready(p, heads[0], 0, row, end - row); });
        attend_.run(of_head_, kernels, team);
        for (int head = 1; head < num_kv_heads_; ++head) {
            team.once([&] { ready(p, heads[head], head, row, end - row); });
            attend_.run(of_head_, kernels, team);
        }
        if (!is_opening() || num_pages == 0) continue;
        team.all([&](int thread) { open(p, heads, row, end - row, kernels, thread, team.num_threads); }, [] {});
    }
    int num_read = num_opened_.load();
    for (const KeyGroups& groups : heads) num_read += groups.num_keys();
    return measures_.is_on() ? kNotTaken : num_read / num_kv_heads_;
}

void DeltaAttend::open(const AttentionProblem& p, const std::vector<KeyGroups>& heads, int first_row, int num_rows,
                       const KernelSet& kernels, int thread, int num_threads) {
    const int num_workers = attend_.num_workers(num_threads), num_items = thread < num_workers ? num_rows * num_kv_heads_ : 0;
    for (int item = thread; item < num_items; item += num_workers) {
        const int head = item % num_kv_heads_, row = first_row + item / num_kv_heads_;
        const int num_opened = opened_.open(p, heads[head], head, first_row, row, rule_.opens, kernels, attend_, thread);
        if (row == p.num_rows - 1) num_opened_ += num_opened;
    }
}

// Makes the problem of some rows, which see all groups, and of the rows beside those what is not behind them.
void DeltaAttend::ready(const AttentionProblem& p, const KeyGroups& groups, int kv_head, int first_row, int num_rows) {
    const int num_keys = groups.num_keys(), num_grouped = groups.num_grouped(), heads_before = kv_head * p.group_size();
    for (int row = 0; row < num_rows; ++row) {
        uint16_t* mask = mask_.data() + size_t(row) * num_keys;
        std::copy(groups.biases(), groups.biases() + num_grouped, mask);
        const int num_visible = num_keys - (num_rows - 1 - row);
        std::fill(mask + num_grouped, mask + num_visible, uint16_t(0));
        std::fill(mask + num_visible, mask + num_keys, kHiddenKey);
    }
    AttentionProblem& own = of_head_ = p;
    if (measures_.is_on()) measures_.take_results(own);
    own.q += first_row * p.q_row_stride + heads_before * p.q_head_stride;
    own.out += first_row * p.out_row_stride + heads_before * p.out_head_stride;
    own.k = reinterpret_cast<const char*>(groups.keys()), own.k_key_stride = sizeof(uint16_t) * p.key_size, own.k_head_stride = 0;
    own.v = reinterpret_cast<const char*>(groups.values()), own.v_key_stride = sizeof(uint16_t) * p.value_size, own.v_head_stride = 0;
    own.k_type = own.v_type = KvType::f16;
    own.mask = reinterpret_cast<const char*>(mask_.data()), own.mask_row_stride = sizeof(uint16_t) * num_keys;
    own.num_rows = num_rows, own.num_heads = p.group_size(), own.num_kv_heads = 1, own.num_keys = num_keys;
    if (own.sinks != nullptr) own.sinks += heads_before;
    if (is_opening()) opened_.watch(own, kv_head);
}

void DeltaAttend::start_measuring() {
    measures_.start(int(layers_.size()), num_kv_heads_, key_size_);
    grouped_ = true;
}

void DeltaAttend::measure(const AttentionProblem& p, int layer) {
    if (!measures_.is_on() || !knows(p, layer)) return;
    if (!taken_) return measures_.leave_out(layer);
    int first_grouped = 0;
    while (first_grouped < p.num_rows && num_pages_before(first_ + first_grouped) == 0) ++first_grouped;
    measures_.compare(p, layer, first_grouped);
}

size_t DeltaAttend::scratch_bytes() const {
    size_t total = attend_.scratch_bytes() + opened_.num_bytes() + sizeof(uint16_t) * mask_.capacity();
    for (const Layer& layer : layers_)
        for (const auto& heads : layer.streams)
            for (const KeyGroups& groups : heads) total += groups.num_bytes();
    return total;
}

#include "state_attend.h"

#include <algorithm>
#include <new>

#include "seen_cells.h"

bool StateAttend::set_units(const StatesRule& rule, const float* thresholds, const float* shares, const float* scales, int num_layers,
                            int num_kv_heads, int key_size) {
    const bool known_block = rule.block == 1 || rule.block == 8 || rule.block == 16;
    if (!known_block || key_size > kMaxHeadSize || key_size % 16 != 0 || rule.num_first < 0 || rule.window < 1) return false;
    const size_t num_units = size_t(num_layers) * num_kv_heads;
    thresholds_.assign(thresholds, thresholds + num_units), shares_.assign(shares, shares + num_units);
    scales_.assign(scales, scales + num_units * key_size);
    stores_.resize(num_kv_heads);
    rule_ = rule, num_kv_heads_ = num_kv_heads, key_size_ = key_size;
    layers_.clear(), layers_.resize(num_layers);
    for (size_t unit = 0; unit < num_units; ++unit)
        if (!(thresholds_[unit] >= 0.0f)) layers_[unit / num_kv_heads].is_taken = false;
    return true;
}

void StateAttend::cut(int num_cells) {
    for (Layer& layer : layers_)
        for (auto& heads : layer.streams)
            for (KeyStates& states : heads) states.cut(num_cells);
}

bool StateAttend::knows(const AttentionProblem& p, int layer) const {
    return layer < int(layers_.size()) && layers_[layer].is_taken && p.num_kv_heads == num_kv_heads_ && p.key_size == key_size_;
}

// Where the node is not ours, the cells that it writes are forgotten all the same.
bool StateAttend::takes(const AttentionProblem& p, int layer, int stream) {
    const int first = first_ = first_position(p);
    auto& streams = layers_[layer].streams;
    if (stream < int(streams.size()))
        for (KeyStates& states : streams[stream]) states.cut(std::max(first, 0));
    states_ = {stores_.data(), rule_.block, first, rule_.window};
    return first >= 0 && is_on_;
}

bool StateAttend::reserve(const AttentionProblem& p, int layer, int stream, int num_threads) {
    if (!is_on_ || !knows(p, layer)) return true;
    auto& streams = layers_[layer].streams;
    try {
        if (int(streams.size()) <= stream) streams.resize(stream + 1);
        if (streams[stream].empty()) streams[stream].resize(num_kv_heads_);
        const int num_cells = padded_to_cells(p.num_keys);
        for (int head = 0; head < num_kv_heads_; ++head) streams[stream][head].reserve(p, rule_of(layer, head), num_cells);
        measures_.reserve(p);
        if (is_opening()) opened_.reserve(p, num_threads);
    } catch (const std::bad_alloc&) {
        return false;
    }
    AttentionProblem few = p;
    few.num_rows = std::min(p.num_rows, WatchedScores::kMostRows);
    return attend_.reserve(p, num_threads) && (!is_opening() || attend_.reserve(few, num_threads));
}

StateRule StateAttend::rule_of(int layer, int kv_head) const {
    const int unit = layer * num_kv_heads_ + kv_head;
    return {rule_.block, rule_.num_first, thresholds_[unit], shares_[unit], scales_.data() + size_t(unit) * key_size_};
}

int StateAttend::run(const AttentionProblem& p, int layer, int stream, const KernelSet& kernels, int thread, int num_threads) {
    ThreadOfTeam team(barrier_, thread, num_threads);
    return run(p, layer, stream, kernels, team);
}

int StateAttend::run(const AttentionProblem& p, int layer, int stream, const KernelSet& kernels, Team& team) {
    if (!knows(p, layer)) return kNotTaken;
    team.once([&] { taken_ = takes(p, layer, stream); });
    if (!taken_) return kNotTaken;
    auto& heads = layers_[layer].streams[stream];
    const int num_pages = states_.num_pages(p.num_rows - 1);
    const auto advance = [&](int thread) {
        for (int head = thread; head < num_kv_heads_; head += team.num_threads) heads[head].advance(p, head, rule_of(layer, head), num_pages);
    };
    const int most_rows = is_opening() ? WatchedScores::kMostRows : p.num_rows;
    team.all(advance, [&] { ready(p, heads), start_rows(p, 0, std::min(most_rows, p.num_rows)); });
    attend_.run(own_, kernels, team);
    if (measures_.is_on()) return kNotTaken;
    if (!is_opening()) return p.num_keys;
    open_rows(kernels, team);
    for (int row = most_rows; row < p.num_rows; row += most_rows) {
        team.once([&] { start_rows(p, row, std::min(most_rows, p.num_rows - row)); });
        attend_.run(own_, kernels, team);
        open_rows(kernels, team);
    }
    team.once([&] { count_opened(p); });
    return p.num_keys;
}

void StateAttend::open_rows(const KernelSet& kernels, Team& team) {
    const int num_workers = attend_.num_workers(team.num_threads), num_items = own_.num_rows * num_kv_heads_;
    team.all([&](int thread) {
        for (int item = thread; thread < num_workers && item < num_items; item += num_workers) {
            const int row = item / num_kv_heads_, num_states = states_.num_pages(row) * kBlockKeys;
            const int num_opened = opened_.open(own_, num_states, item % num_kv_heads_, row, rule_.opens, kernels, attend_, thread);
            if (row == own_.num_rows - 1) num_opened_ += num_opened;
        }
    }, [] {});
}

void StateAttend::ready(const AttentionProblem& p, const std::vector<KeyStates>& heads) {
    for (int head = 0; head < num_kv_heads_; ++head) stores_[head] = heads[head].view();
    if (!measures_.is_on()) count(p, heads);
}

void StateAttend::start_rows(const AttentionProblem& p, int first_row, int num_rows) {
    own_ = p;
    own_.states = &states_;
    if (measures_.is_on()) return measures_.take_results(own_);
    own_.q += first_row * p.q_row_stride, own_.out += first_row * p.out_row_stride, own_.mask += first_row * p.mask_row_stride;
    own_.num_rows = num_rows;
    states_.first_position = first_ + first_row;
    num_opened_ = 0;
    if (is_opening()) opened_.watch(own_);
}

void StateAttend::count_opened(const AttentionProblem& p) {
    counts_.channels_multiplied += int64_t(num_opened_) * key_size_;
    counts_.key_bytes_read += num_opened_ * int64_t(stored_bytes(p.k_type, key_size_));
}

void StateAttend::count(const AttentionProblem& p, const std::vector<KeyStates>& heads) {
    const int last = p.num_rows - 1, num_pages = states_.num_pages(last), seen = states_.first_position + p.num_rows;
    const int64_t num_behind = int64_t(num_pages) * kBlockKeys, key_bytes = int64_t(stored_bytes(p.k_type, key_size_));
    const int64_t beside = seen - num_behind, num_blocks = int64_t(num_pages) * (key_size_ / rule_.block);
    for (const KeyStates& states : heads) {
        const int64_t num_sent = states.num_sent(num_pages);
        counts_.channels_held += int64_t(seen) * key_size_, counts_.channels_behind += num_behind * key_size_;
        counts_.channels_sent += num_sent, counts_.channels_multiplied += num_sent + beside * key_size_;
        counts_.key_bytes_held += seen * key_bytes;
        counts_.key_bytes_read += int64_t(sizeof(uint16_t)) * num_sent + num_blocks + states.member_bytes(num_pages) + beside * key_bytes;
    }
}

void StateAttend::start_measuring() {
    measures_.start(int(layers_.size()), num_kv_heads_, key_size_);
    is_on_ = true;
}

void StateAttend::measure(const AttentionProblem& p, int layer) {
    if (!measures_.is_on() || !knows(p, layer)) return;
    if (!taken_) return measures_.leave_out(layer);
    int first_compared = 0;
    while (first_compared < p.num_rows && states_.num_pages(first_compared) == 0) ++first_compared;
    measures_.compare(p, layer, first_compared);
}

void StateAttend::read_shares(float* shares) const {
    for (const Layer& layer : layers_)
        for (int head = 0; head < num_kv_heads_; ++head) {
            int64_t num_sent = 0, num_held = 0;
            for (const auto& heads : layer.streams)
                if (!heads.empty()) {
                    num_sent += heads[head].num_sent(heads[head].num_pages());
                    num_held += int64_t(heads[head].num_pages()) * kBlockKeys * key_size_;
                }
            *shares++ = num_held == 0 ? 1.0f : float(num_sent) / float(num_held);
        }
}

size_t StateAttend::scratch_bytes() const {
    size_t total = attend_.scratch_bytes() + opened_.num_bytes();
    for (const Layer& layer : layers_)
        for (const auto& heads : layer.streams)
            for (const KeyStates& states : heads) total += states.num_bytes();
    return total;
}

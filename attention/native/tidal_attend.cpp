#include "tidal_attend.h"

#include <algorithm>
#include <new>

namespace {

constexpr int kScoredRows = 4;   // the last rows of a pass choose for all of them
constexpr int kNoSet = -1;

int num_scored_rows(const AttentionProblem& p) { return std::min(p.num_rows, kScoredRows); }

template <class T> void grow(std::vector<T>& room, size_t size) {
    if (room.size() < size) room.resize(size);
}

}  // namespace

void TidalAttend::set_roles(const uint8_t* roles, int num_layers, const SelectionRule& rule) {
    rule_ = rule;
    roles_.clear(), set_of_layer_.clear(), sets_.clear();
    for (int layer = 0; layer < num_layers; ++layer) {
        roles_.push_back(Role(roles[layer]));
        if (roles_.back() == Role::select) sets_.emplace_back();
        set_of_layer_.push_back(int(sets_.size()) - 1);
    }
}

void TidalAttend::start_pass(bool sparse, bool refresh) {
    sparse_ = sparse, refresh_ = refresh;
    for (KeySet& set : sets_) sparse && !refresh ? set.expire() : set.forget();
}

TidalAttend::Role TidalAttend::role_now(const AttentionProblem& p, int layer) const {
    const bool sparse = sparse_ && p.num_rows <= kDraftRows && layer < int(roles_.size()) && set_of_layer_[layer] != kNoSet;
    return sparse ? roles_[layer] : Role::dense;
}

bool TidalAttend::reserve(const AttentionProblem& p, int layer, int num_threads) {
    if (!attend_.reserve(p, num_threads)) return false;
    if (role_now(p, layer) != Role::select) return true;
    const size_t num_lines = size_t(num_scored_rows(p)) * p.num_heads, num_keys = padded_to_blocks(p.num_keys);
    try {
        grow(scores_, num_lines * num_keys), grow(totals_, 2 * num_lines), grow(weights_, num_keys);
        sets_[set_of_layer_[layer]].reserve(p.num_keys);
    } catch (const std::bad_alloc&) {
        return false;
    }
    return true;
}

int TidalAttend::run(AttentionProblem p, int layer, const KernelSet& kernels, int thread, int num_threads) {
    ThreadOfTeam team(barrier_, thread, num_threads);
    return run(p, layer, kernels, team);
}

int TidalAttend::run(AttentionProblem p, int layer, const KernelSet& kernels, Team& team) {
    const Role role = role_now(p, layer);
    if (role == Role::reuse) return reuse(p, sets_[set_of_layer_[layer]], kernels, team);
    if (role == Role::select) {
        KeySet& set = sets_[set_of_layer_[layer]];
        if (!refresh_ && set.has_picks()) {
            team.once([&] { set.renew(p, rule_); });
            return reuse(p, set, kernels, team);
        }
        select(p, set, kernels, team);
    } else {
        attend_.run(p, kernels, team);
    }
    return p.num_keys;
}

void TidalAttend::select(AttentionProblem p, KeySet& set, const KernelSet& kernels, Team& team) {
    if (rule_.budget(p.num_keys) >= p.num_keys) {
        team.once([&] { set.take_all(p); });
        attend_.run(p, kernels, team);
        return;
    }
    p.first_scored_row = p.num_rows - num_scored_rows(p);
    p.scores_stride = padded_to_blocks(p.num_keys);
    p.scores = scores_.data(), p.totals = totals_.data();
    attend_.run(p, kernels, team);
    const int num_workers = attend_.num_workers(team.num_threads);
    team.all([&](int thread) {
        if (thread < num_workers) weigh(p, kernels, thread, num_workers);
    }, [&] { set.choose(p, rule_, weights_.data()); });
}

void TidalAttend::weigh(const AttentionProblem& p, const KernelSet& kernels, int thread, int num_workers) {
    const int num_blocks = p.scores_stride / kBlockKeys, num_lines = num_scored_rows(p) * p.num_heads;
    const int begin = num_blocks * thread / num_workers * kBlockKeys, end = num_blocks * (thread + 1) / num_workers * kBlockKeys;
    std::fill(weights_.begin() + begin, weights_.begin() + end, 0.0f);
    for (int line = 0; line < num_lines; ++line)
        kernels.add_weights(scores_.data() + size_t(line) * p.scores_stride + begin, totals_.data() + 2 * line, end - begin,
                            weights_.data() + begin);
}

int TidalAttend::reuse(AttentionProblem p, const KeySet& set, const KernelSet& kernels, Team& team) {
    if (set.serves(p) && !set.is_all()) p.selected = set.cells().data(), p.num_keys = int(set.cells().size());
    attend_.run(p, kernels, team);
    return p.num_keys;
}

const KeySet* TidalAttend::set_of(int layer) const {
    return layer < int(set_of_layer_.size()) && set_of_layer_[layer] != kNoSet ? &sets_[set_of_layer_[layer]] : nullptr;
}

size_t TidalAttend::scratch_bytes() const {
    size_t total = attend_.scratch_bytes() + sizeof(float) * (scores_.size() + totals_.size() + weights_.size());
    for (const KeySet& set : sets_) total += set.num_bytes();
    return total;
}

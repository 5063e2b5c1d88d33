// TidalDecode. Top-k selection uses a histogram of the weights' leading bits: weights are not negative, so their bits
// are in order.

#include "sparse/tidal.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <new>

#include "containers.h"

namespace {

constexpr uint8_t kHidden = 0, kVisible = 1, kTopK = 2, kForced = 3;
constexpr int kBinShift = 20, kNumBins = 1 << 11;

uint32_t bits_of(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    return bits;
}

}  // namespace

void SelectedKeys::reserve(int num_slots) {
    if (marks_.capacity() >= size_t(num_slots)) return;
    slots_.reserve(num_slots), top_k_.reserve(num_slots), marks_.reserve(num_slots), candidates_.reserve(num_slots);
}

size_t SelectedKeys::num_bytes() const {
    return sizeof(int32_t) * (slots_.capacity() + top_k_.capacity() + candidates_.capacity()) + marks_.capacity();
}

void SelectedKeys::bind(const AttentionProblem& p) { mask_ = p.mask, num_keys_ = p.num_keys, num_tokens_ = p.num_tokens; }

void SelectedKeys::select_all(const AttentionProblem& p) {
    clear();
    bind(p);
    is_all_ = true;
}

// Marks the keys that any token sees. Each token's sink tokens and recent tokens are forced. Returns the number of
// visible keys.
int SelectedKeys::mark(const AttentionProblem& p, const SelectionRule& rule) {
    marks_.assign(p.num_keys, kHidden);
    for (int token = 0; token < p.num_tokens; ++token) {
        const auto* mask = reinterpret_cast<const uint16_t*>(p.mask + token * p.mask_token_stride);
        for (int j = 0; j < p.num_keys; ++j) marks_[j] |= mask[j] != kMaskedKey;
        int left = rule.num_sink_tokens;
        for (int j = 0; j < p.num_keys && left > 0; ++j)
            if (mask[j] != kMaskedKey) marks_[j] = kForced, --left;
        left = rule.num_recent;
        for (int j = p.num_keys - 1; j >= 0 && left > 0; --j)
            if (mask[j] != kMaskedKey) marks_[j] = kForced, --left;
    }
    num_forced_ = int(std::count(marks_.begin(), marks_.end(), kForced));
    return p.num_keys - int(std::count(marks_.begin(), marks_.end(), kHidden));
}

void SelectedKeys::select(const AttentionProblem& p, const SelectionRule& rule, const float* weights) {
    clear();
    bind(p);
    const int num_visible = mark(p, rule), budget = rule.budget(num_visible);
    is_all_ = budget >= num_visible;
    if (is_all_) return;
    mark_top_k(budget - num_forced_, weights);
    for (int j = 0; j < p.num_keys; ++j)
        if (marks_[j] == kTopK) top_k_.push_back(j);
    collect_slots();
}

void SelectedKeys::update_window(const AttentionProblem& p, const SelectionRule& rule) {
    bind(p);
    const int num_visible = mark(p, rule);
    is_all_ = rule.budget(num_visible) >= num_visible;
    for (const int32_t key : top_k_)
        if (key < p.num_keys && marks_[key] == kVisible) marks_[key] = kTopK;
    collect_slots();
}

void SelectedKeys::mark_top_k(int k, const float* weights) {
    if (k <= 0) return;
    const int num_keys = int(marks_.size());
    int histogram[kNumBins] = {};
    for (int j = 0; j < num_keys; ++j) histogram[bits_of(weights[j]) >> kBinShift] += marks_[j] == kVisible;
    int bin = kNumBins - 1, above = 0;
    while (bin > 0 && above + histogram[bin] < k) above += histogram[bin--];
    candidates_.clear();
    for (int j = 0; j < num_keys; ++j)
        if (marks_[j] == kVisible && int(bits_of(weights[j]) >> kBinShift) == bin) candidates_.push_back(bits_of(weights[j]));
    const size_t rank = std::min(size_t(k - above), candidates_.size());
    if (rank == 0) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + (rank - 1), candidates_.end(), std::greater<uint32_t>());
    const uint32_t smallest = candidates_[rank - 1];
    int num_equal = int(rank - std::count_if(candidates_.begin(), candidates_.end(), [=](uint32_t bits) { return bits > smallest; }));
    for (int j = 0; j < num_keys; ++j) {
        if (marks_[j] != kVisible) continue;
        const uint32_t bits = bits_of(weights[j]);
        if (bits > smallest || (bits == smallest && num_equal-- > 0)) marks_[j] = kTopK;
    }
}

void SelectedKeys::collect_slots() {
    slots_.clear();
    for (int j = 0; j < int(marks_.size()); ++j)
        if (marks_[j] >= kTopK) slots_.push_back(j);
}

namespace {

constexpr int kScoredTokens = 4;  // the last tokens of a batch select for all of them
constexpr int kNoSelection = -1;

int num_scored_tokens(const AttentionProblem& p) { return std::min(p.num_tokens, kScoredTokens); }

}  // namespace

void TidalPolicy::set_roles(const uint8_t* roles, int num_layers, const SelectionRule& rule) {
    rule_ = rule;
    roles_.clear(), selection_index_.clear(), selections_.clear();
    for (int layer = 0; layer < num_layers; ++layer) {
        roles_.push_back(LayerRole(roles[layer]));
        if (roles_.back() == LayerRole::select) selections_.emplace_back();
        selection_index_.push_back(int(selections_.size()) - 1);
    }
}

void TidalPolicy::start_pass(const PassOptions& options) {
    is_sparse_ = options.sparse, refresh_ = options.refresh;
    for (SelectedKeys& selection : selections_) is_sparse_ && !refresh_ ? selection.expire() : selection.clear();
}

TidalPolicy::LayerRole TidalPolicy::current_role(const AttentionProblem& p, int layer) const {
    const bool sparse =
        is_sparse_ && p.num_tokens <= kMaxDraftTokens && layer < int(roles_.size()) && selection_index_[layer] != kNoSelection;
    return sparse ? roles_[layer] : LayerRole::dense;
}

bool TidalPolicy::reserve(const AttentionProblem& p, int layer, int /* stream */, int num_threads) {
    if (!flash_.reserve(p, num_threads)) return false;
    if (current_role(p, layer) != LayerRole::select) return true;
    const size_t num_queries = size_t(num_scored_tokens(p)) * p.num_heads, num_keys = padded_to_blocks(p.num_keys);
    try {
        ensure_size(scores_, num_queries * num_keys), ensure_size(softmax_stats_, 2 * num_queries), ensure_size(weights_, num_keys);
        selections_[selection_index_[layer]].reserve(p.num_keys);
    } catch (const std::bad_alloc&) {
        return false;
    }
    return true;
}

int TidalPolicy::run(const AttentionProblem& p, int layer, int /* stream */, const AttentionKernels& kernels, ThreadGroup& threads) {
    const LayerRole role = current_role(p, layer);
    if (role == LayerRole::dense) return kSkipped;
    SelectedKeys& selection = selections_[selection_index_[layer]];
    if (role == LayerRole::reuse) return reuse(p, selection, kernels, threads);
    if (refresh_ || !selection.has_top_k()) return select(p, selection, kernels, threads);
    threads.single([&] { selection.update_window(p, rule_); });
    return reuse(p, selection, kernels, threads);
}

int TidalPolicy::select(AttentionProblem p, SelectedKeys& selection, const AttentionKernels& kernels, ThreadGroup& threads) {
    if (rule_.budget(p.num_keys) >= p.num_keys) {
        threads.single([&] { selection.select_all(p); });
        flash_.run(p, kernels, threads);
        return p.num_keys;
    }
    p.first_scored_token = p.num_tokens - num_scored_tokens(p);
    p.scores_stride = padded_to_blocks(p.num_keys);
    p.scores = scores_.data(), p.softmax_stats = softmax_stats_.data();
    flash_.run(p, kernels, threads);
    const int num_workers = flash_.num_workers(threads.num_threads);
    threads.parallel_for([&](int thread) {
        if (thread < num_workers) accumulate(p, kernels, thread, num_workers);
    }, [&] { selection.select(p, rule_, weights_.data()); });
    return p.num_keys;
}

void TidalPolicy::accumulate(const AttentionProblem& p, const AttentionKernels& kernels, int thread, int num_workers) {
    const int num_blocks = p.scores_stride / kBlockKeys, num_queries = num_scored_tokens(p) * p.num_heads;
    const int begin = num_blocks * thread / num_workers * kBlockKeys, end = num_blocks * (thread + 1) / num_workers * kBlockKeys;
    std::fill(weights_.begin() + begin, weights_.begin() + end, 0.0f);
    for (int query = 0; query < num_queries; ++query)
        kernels.add_weights(scores_.data() + size_t(query) * p.scores_stride + begin, softmax_stats_.data() + 2 * query, end - begin,
                            weights_.data() + begin);
}

int TidalPolicy::reuse(AttentionProblem p, const SelectedKeys& selection, const AttentionKernels& kernels, ThreadGroup& threads) {
    if (selection.matches(p) && !selection.is_all())
        p.selected_slots = selection.slots().data(), p.num_keys = int(selection.slots().size());
    flash_.run(p, kernels, threads);
    return p.num_keys;
}

size_t TidalPolicy::scratch_bytes() const {
    size_t total = sizeof(float) * (scores_.size() + softmax_stats_.size() + weights_.size());
    for (const SelectedKeys& selection : selections_) total += selection.num_bytes();
    return total;
}

extern "C" int lowtide_policy_set_roles(CurrentPolicy* policy, const uint8_t* roles, int num_layers, const SelectionRule* rule) {
    return policy->configure<TidalPolicy>([=](TidalPolicy& tidal) { return tidal.set_roles(roles, num_layers, *rule), true; });
}

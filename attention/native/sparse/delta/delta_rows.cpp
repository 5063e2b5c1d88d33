// Attention over clustered keys. A batch is processed in runs of tokens that have the same pages behind their
// windows. Each run is one dense problem per KV head: its keys are the clusters of those pages and the tokens behind
// them.

#include "sparse/delta/delta_rows.h"

#include <algorithm>
#include <new>

#include "attention/problem.h"

namespace {

AttentionProblem clusters_of(const AttentionProblem& head_problem, const ClusteredKeys& store) {
    AttentionProblem own = head_problem;
    own.k = reinterpret_cast<const char*>(store.keys()), own.k_key_stride = sizeof(uint16_t) * own.key_dim;
    own.v = reinterpret_cast<const char*>(store.values()), own.v_key_stride = sizeof(uint16_t) * own.value_dim;
    own.k_type = own.v_type = KvType::f16;
    own.mask = reinterpret_cast<const char*>(store.biases());
    return own;
}

}  // namespace

void ClusterRefiner::reserve(const AttentionProblem& p, int max_keys, int num_threads) {
    recorder_.reserve(p.num_kv_heads, p.num_tokens, p.group_size(), max_keys);
    scratch_.reserve(p, num_threads);
}

int ClusterRefiner::refine(const AttentionProblem& p, const ClusteredKeys& store, int kv_head, int first_token, int token, float threshold,
                           const AttentionKernels& kernels, FlashAttention& attend, int thread) {
    const RecordedScores recorded = recorder_.scores_of(kv_head, token - first_token, p.group_size(), 0, p.group_size(), threshold);
    const MergeScratch::ThreadScratch scratch = scratch_.for_thread(p, thread);
    float *added = scratch.added, *removed = scratch.removed;
    int32_t *keys = scratch.keys, *clusters = scratch.clusters;
    AttentionProblem keys_problem = view_of_head(p, kv_head, token), clusters_problem = clusters_of(keys_problem, store);
    keys_problem.selected_slots = keys, clusters_problem.selected_slots = clusters;
    keys_problem.num_keys = clusters_problem.num_keys = 0;
    int num_refined = 0;
    const auto flush = [&] {
        if (num_refined == 0)
            FlashAttention::start_partials(p, p.group_size(), added), FlashAttention::start_partials(p, p.group_size(), removed);
        attend.add_keys(keys_problem, kernels, thread, added), attend.add_keys(clusters_problem, kernels, thread, removed);
        num_refined += keys_problem.num_keys;
        keys_problem.num_keys = clusters_problem.num_keys = 0;
    };
    for (int first = 0; first < store.num_clustered(); first += kBlockKeys) {
        if (!recorded.block_exceeds_threshold(first)) continue;
        for (int cluster = first; cluster < std::min(first + kBlockKeys, store.num_clustered()); ++cluster) {
            const bool is_single = store.biases()[cluster] == 0;
            if (is_single || !recorded.exceeds_threshold(cluster)) continue;
            if (keys_problem.num_keys + kPageKeys > MergeScratch::kMaxPending) flush();
            clusters[clusters_problem.num_keys++] = cluster;
            keys_problem.num_keys += store.list_keys(cluster, keys + keys_problem.num_keys);
        }
    }
    if (keys_problem.num_keys > 0) flush();
    if (num_refined > 0) recorded.replace(keys_problem, removed, added);
    return num_refined;
}

namespace {

// The most tokens beside clusters in a run: the window, and pages that are not full yet.
int max_recent_tokens(int window) { return window + 3 * kPageKeys; }

}  // namespace

bool DeltaRowsPolicy::set_head_params(const DeltaRowsRule& rule, const uint8_t* num_clusters, const float* score_bias, const float* scales,
                                      int num_layers, int num_kv_heads, int key_dim) {
    const size_t num_heads_in_all = size_t(num_layers) * num_kv_heads;
    const bool is_valid =
        key_dim <= kMaxHeadDim && rule.num_sink_tokens >= 0 && rule.window >= 0 &&
        std::all_of(num_clusters, num_clusters + num_heads_in_all, [&](int n) { return n > rule.num_sink_tokens && n <= kPageKeys; });
    if (!is_valid) return false;
    rule_ = rule, num_layers_ = num_layers, num_kv_heads_ = num_kv_heads, key_dim_ = key_dim;
    num_clusters_.assign(num_clusters, num_clusters + num_heads_in_all);
    score_bias_.assign(score_bias, score_bias + num_heads_in_all), scales_.assign(scales, scales + num_heads_in_all * key_dim);
    layers_.clear(), layers_.resize(num_layers);
    for (int layer = 0; layer < num_layers; ++layer)
        for (int head = 0; head < num_kv_heads; ++head)
            layers_[layer].is_clustered |= num_clusters_[layer * num_kv_heads + head] < kPageKeys;
    return true;
}

void DeltaRowsPolicy::truncate(int num_slots) {
    for (Layer& layer : layers_)
        for (auto& heads : layer.streams)
            for (ClusteredKeys& store : heads) store.truncate(num_slots);
}

bool DeltaRowsPolicy::applies_to(const AttentionProblem& p, int layer) const {
    return layer < int(layers_.size()) && layers_[layer].is_clustered && p.num_kv_heads == num_kv_heads_ && p.key_dim == key_dim_;
}

// If the policy skips the node, it still drops the slots that the node writes.
bool DeltaRowsPolicy::starts_pass(const AttentionProblem& p, int layer, int stream) {
    const int first = first_position_ = first_position(p);
    auto& streams = layers_[layer].streams;
    if (stream < int(streams.size()))
        for (ClusteredKeys& store : streams[stream]) store.truncate(std::max(first, 0));
    return first >= 0 && is_on_;
}

bool DeltaRowsPolicy::reserve(const AttentionProblem& p, int layer, int stream, int num_threads) {
    if (!is_on_ || !applies_to(p, layer)) return true;
    auto& streams = layers_[layer].streams;
    const int num_slots = padded_to_slots(p.num_keys), num_recent = std::min(max_recent_tokens(rule_.window), num_slots);
    AttentionProblem largest = p;
    largest.num_kv_heads = 1, largest.num_heads = p.group_size();
    largest.num_keys = num_slots;
    try {
        if (int(streams.size()) <= stream) streams.resize(stream + 1);
        if (streams[stream].empty()) streams[stream].resize(num_kv_heads_);
        size_t max_keys = 0;
        for (int head = 0; head < num_kv_heads_; ++head) {
            const int num_clusters = num_clusters_[layer * num_kv_heads_ + head];
            streams[stream][head].reserve(p, num_clusters, num_slots, num_recent);
            max_keys = std::max(max_keys, size_t(num_slots / kPageKeys) * num_clusters + num_recent);
        }
        error_stats_.reserve(p);
        if (is_refining()) refiner_.reserve(p, int(max_keys), num_threads);
        const size_t mask_size = max_keys * std::min(p.num_tokens, kPageKeys);
        if (mask_.size() < mask_size) mask_.reserve(mask_size), mask_.resize(mask_size);
        largest.num_keys = int(std::max(size_t(largest.num_keys), max_keys));
    } catch (const std::bad_alloc&) {
        return false;
    }
    // A run may have few tokens although the batch has many.
    largest.num_tokens = std::min(p.num_tokens, 8);
    if (!flash_.reserve(largest, num_threads)) return false;
    largest.num_tokens = p.num_tokens;
    return flash_.reserve(largest, num_threads);
}

ClusterRule DeltaRowsPolicy::cluster_rule(const AttentionProblem& p, int layer, int kv_head) const {
    const int index = layer * num_kv_heads_ + kv_head;
    return {num_clusters_[index], rule_.num_sink_tokens, score_bias_[index] * p.scale * p.scale, scales_.data() + size_t(index) * key_dim_};
}

int DeltaRowsPolicy::num_pages_before(int position) const { return std::max(position + 1 - rule_.window, 0) / kPageKeys; }

int DeltaRowsPolicy::run(const AttentionProblem& p, int layer, int stream, const AttentionKernels& kernels, ThreadGroup& threads) {
    if (!applies_to(p, layer)) return kSkipped;
    threads.single([&] { runs_ = starts_pass(p, layer, stream), num_refined_ = 0; });
    if (!runs_) return kSkipped;
    auto& heads = layers_[layer].streams[stream];
    const int first = first_position_;
    const int max_tokens = is_refining() ? ScoreRecorder::kMaxTokens : kPageKeys;
    for (int token = 0, end = 0; token < p.num_tokens; token = end) {
        const int num_pages = num_pages_before(first + token);
        while (end < p.num_tokens && num_pages_before(first + end) == num_pages && end - token < max_tokens) ++end;
        const auto advance = [&](int thread) {
            for (int head = thread; head < num_kv_heads_; head += threads.num_threads)
                heads[head].advance(p, head, cluster_rule(p, layer, head), num_pages, first + end);
        };
        threads.parallel_for(advance, [&] { prepare(p, heads[0], 0, token, end - token); });
        flash_.run(head_problem_, kernels, threads);
        for (int head = 1; head < num_kv_heads_; ++head) {
            threads.single([&] { prepare(p, heads[head], head, token, end - token); });
            flash_.run(head_problem_, kernels, threads);
        }
        if (!is_refining() || num_pages == 0) continue;
        threads.parallel_for([&](int thread) { refine(p, heads, token, end - token, kernels, thread, threads.num_threads); }, [] {});
    }
    int num_read = num_refined_.load();
    for (const ClusteredKeys& store : heads) num_read += store.num_keys();
    return error_stats_.is_on() ? kSkipped : num_read / num_kv_heads_;
}

void DeltaRowsPolicy::refine(const AttentionProblem& p, const std::vector<ClusteredKeys>& heads, int first_token, int num_tokens,
                             const AttentionKernels& kernels, int thread, int num_threads) {
    const int num_workers = flash_.num_workers(num_threads), num_items = thread < num_workers ? num_tokens * num_kv_heads_ : 0;
    for (int item = thread; item < num_items; item += num_workers) {
        const int head = item % num_kv_heads_, token = first_token + item / num_kv_heads_;
        const int num_refined = refiner_.refine(p, heads[head], head, first_token, token, rule_.refine, kernels, flash_, thread);
        if (token == p.num_tokens - 1) num_refined_ += num_refined;
    }
}

// Builds the problem of some tokens. They see all clusters and, of the single tokens, those up to themselves.
void DeltaRowsPolicy::prepare(const AttentionProblem& p, const ClusteredKeys& store, int kv_head, int first_token, int num_tokens) {
    const int num_keys = store.num_keys(), num_clustered = store.num_clustered(), heads_before = kv_head * p.group_size();
    for (int token = 0; token < num_tokens; ++token) {
        uint16_t* mask = mask_.data() + size_t(token) * num_keys;
        std::copy(store.biases(), store.biases() + num_clustered, mask);
        const int num_visible = num_keys - (num_tokens - 1 - token);
        std::fill(mask + num_clustered, mask + num_visible, uint16_t(0));
        std::fill(mask + num_visible, mask + num_keys, kMaskedKey);
    }
    AttentionProblem& own = head_problem_ = p;
    if (error_stats_.is_on()) error_stats_.redirect_output(own);
    own.q += first_token * p.q_token_stride + heads_before * p.q_head_stride;
    own.out += first_token * p.out_token_stride + heads_before * p.out_head_stride;
    own.k = reinterpret_cast<const char*>(store.keys()), own.k_key_stride = sizeof(uint16_t) * p.key_dim, own.k_head_stride = 0;
    own.v = reinterpret_cast<const char*>(store.values()), own.v_key_stride = sizeof(uint16_t) * p.value_dim, own.v_head_stride = 0;
    own.k_type = own.v_type = KvType::f16;
    own.mask = reinterpret_cast<const char*>(mask_.data()), own.mask_token_stride = sizeof(uint16_t) * num_keys;
    own.num_tokens = num_tokens, own.num_heads = p.group_size(), own.num_kv_heads = 1, own.num_keys = num_keys;
    if (own.sinks != nullptr) own.sinks += heads_before;
    if (is_refining()) refiner_.record(own, kv_head);
}

void DeltaRowsPolicy::measure(const AttentionProblem& p, int layer) {
    if (!error_stats_.is_on() || !applies_to(p, layer)) return;
    if (!runs_) return error_stats_.skip(layer);
    int first_clustered = 0;
    while (first_clustered < p.num_tokens && num_pages_before(first_position_ + first_clustered) == 0) ++first_clustered;
    error_stats_.compare(p, layer, first_clustered);
}

size_t DeltaRowsPolicy::scratch_bytes() const {
    size_t total = refiner_.num_bytes() + sizeof(uint16_t) * mask_.capacity();
    for (const Layer& layer : layers_)
        for (const auto& heads : layer.streams)
            for (const ClusteredKeys& store : heads) total += store.num_bytes();
    return total;
}

extern "C" int lowtide_policy_set_delta_rows(CurrentPolicy* policy, const DeltaRowsRule* rule, const uint8_t* num_clusters,
                                             const float* score_bias, const float* scales, int num_layers, int num_kv_heads, int key_dim) {
    return policy->configure<DeltaRowsPolicy>([=](DeltaRowsPolicy& rows) {
        return rows.set_head_params(*rule, num_clusters, score_bias, scales, num_layers, num_kv_heads, key_dim);
    });
}

extern "C" void lowtide_policy_start_delta_rows(CurrentPolicy* policy, int refine) {
    if (auto* rows = policy->find<DeltaRowsPolicy>()) rows->start_pass({true, true, refine != 0});
}

extern "C" int lowtide_policy_measure_delta_rows(CurrentPolicy* policy) {
    auto* rows = policy->find<DeltaRowsPolicy>();
    return rows == nullptr ? 0 : error_code([=] { return rows->start_error_stats(), true; });
}

extern "C" void lowtide_policy_read_delta_rows_errors(const CurrentPolicy* policy, float* errors, float* squares) {
    if (const auto* rows = policy->find<DeltaRowsPolicy>()) rows->read_error_stats(errors, squares);
}

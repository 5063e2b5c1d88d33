// Attention over merged key blocks.

#include "sparse/delta/delta_blocks.h"

#include <algorithm>
#include <cmath>
#include <new>

#include "attention/kv_row.h"
#include "attention/problem.h"

namespace {

// Adds recorded scores and values of the pending keys to the partials of the heads: what the merged keys contributed.
void add_recorded(const AttentionProblem& head_problem, const RecordedScores& num_visible, float* partials) {
    float value[kMaxHeadDim];
    for (int i = 0; i < head_problem.num_keys; ++i) {
        const int key = head_problem.selected_slots[i];
        row_to_float(head_problem.v_type, head_problem.v + key * head_problem.v_key_stride, head_problem.value_dim, value);
        for (int head = 0; head < num_visible.num_heads; ++head) {
            float* partial = partials + head * partial_floats(head_problem);
            partial[0] = num_visible.softmax_stats[2 * head];
            const float weight = std::exp(num_visible.scores[size_t(head) * num_visible.stride + key] - partial[0]);
            partial[1] += weight;
            for (int d = 0; d < head_problem.value_dim; ++d) partial[2 + d] += weight * value[d];
        }
    }
}

}  // namespace

void BlockRefiner::reserve(const AttentionProblem& p, int num_threads) {
    recorder_.reserve(1, p.num_tokens, p.num_heads, p.num_keys);
    scratch_.reserve(p, num_threads);
}

int BlockRefiner::refine(const AttentionProblem& p, int num_merged, int kv_head, int token, float threshold,
                         const AttentionKernels& kernels, FlashAttention& attend, int thread) {
    const RecordedScores num_visible = recorder_.scores_of(0, token, p.num_heads, kv_head * p.group_size(), p.group_size(), threshold);
    const MergeScratch::ThreadScratch scratch = scratch_.for_thread(p, thread);
    float *added = scratch.added, *removed = scratch.removed;
    int32_t* keys = scratch.keys;
    AttentionProblem keys_problem = view_of_head(p, kv_head, token);
    keys_problem.selected_slots = keys, keys_problem.num_keys = 0;
    int num_refined = 0;
    const auto flush = [&] {
        if (num_refined == 0)
            FlashAttention::start_partials(p, p.group_size(), added), FlashAttention::start_partials(p, p.group_size(), removed);
        attend.add_keys(keys_problem, kernels, thread, added), add_recorded(keys_problem, num_visible, removed);
        num_refined += keys_problem.num_keys;
        keys_problem.num_keys = 0;
    };
    for (int first = 0; first < num_merged; first += kBlockKeys) {
        if (!num_visible.block_exceeds_threshold(first)) continue;
        if (keys_problem.num_keys + kBlockKeys > MergeScratch::kMaxPending) flush();
        const uint64_t exact = p.merged_keys->stores[kv_head].exact[first / kBlockKeys];
        for (int i = 0; i < kBlockKeys; ++i)
            if ((exact >> i & 1) == 0 && num_visible.exceeds_threshold(first + i)) keys[keys_problem.num_keys++] = first + i;
    }
    if (keys_problem.num_keys > 0) flush();
    if (num_refined > 0) num_visible.replace(keys_problem, removed, added);
    return num_refined;
}

bool DeltaBlocksPolicy::set_head_params(const DeltaBlocksRule& rule, const float* thresholds, const float* max_shares, const float* scales,
                                        int num_layers, int num_kv_heads, int key_dim) {
    const bool is_known_block = rule.block_size == 1 || rule.block_size == 8 || rule.block_size == 16;
    if (!is_known_block || key_dim > kMaxHeadDim || key_dim % 16 != 0 || rule.num_sink_tokens < 0 || rule.window < 1) return false;
    const size_t num_heads_in_all = size_t(num_layers) * num_kv_heads;
    thresholds_.assign(thresholds, thresholds + num_heads_in_all), max_shares_.assign(max_shares, max_shares + num_heads_in_all);
    scales_.assign(scales, scales + num_heads_in_all * key_dim);
    stores_.resize(num_kv_heads);
    rule_ = rule, num_layers_ = num_layers, num_kv_heads_ = num_kv_heads, key_dim_ = key_dim;
    layers_.clear(), layers_.resize(num_layers);
    for (size_t index = 0; index < num_heads_in_all; ++index)
        if (!(thresholds_[index] >= 0.0f)) layers_[index / num_kv_heads].is_on = false;
    return true;
}

void DeltaBlocksPolicy::truncate(int num_slots) {
    for (Layer& layer : layers_)
        for (auto& heads : layer.streams)
            for (BlockStore& store : heads) store.truncate(num_slots);
}

bool DeltaBlocksPolicy::applies_to(const AttentionProblem& p, int layer) const {
    return layer < int(layers_.size()) && layers_[layer].is_on && p.num_kv_heads == num_kv_heads_ && p.key_dim == key_dim_;
}

// If the policy skips the node, it still drops the slots that the node writes.
bool DeltaBlocksPolicy::starts_pass(const AttentionProblem& p, int layer, int stream) {
    const int first = first_position_ = first_position(p);
    auto& streams = layers_[layer].streams;
    if (stream < int(streams.size()))
        for (BlockStore& store : streams[stream]) store.truncate(std::max(first, 0));
    merged_keys_ = {stores_.data(), rule_.block_size, first, rule_.window};
    return first >= 0 && is_on_;
}

bool DeltaBlocksPolicy::reserve(const AttentionProblem& p, int layer, int stream, int num_threads) {
    if (!is_on_ || !applies_to(p, layer)) return true;
    auto& streams = layers_[layer].streams;
    try {
        if (int(streams.size()) <= stream) streams.resize(stream + 1);
        if (streams[stream].empty()) streams[stream].resize(num_kv_heads_);
        const int num_slots = padded_to_slots(p.num_keys);
        for (int head = 0; head < num_kv_heads_; ++head) streams[stream][head].reserve(p, merge_rule(layer, head), num_slots);
        error_stats_.reserve(p);
        if (is_refining()) refiner_.reserve(p, num_threads);
    } catch (const std::bad_alloc&) {
        return false;
    }
    AttentionProblem few = p;
    few.num_tokens = std::min(p.num_tokens, ScoreRecorder::kMaxTokens);
    return flash_.reserve(p, num_threads) && (!is_refining() || flash_.reserve(few, num_threads));
}

MergeRule DeltaBlocksPolicy::merge_rule(int layer, int kv_head) const {
    const int index = layer * num_kv_heads_ + kv_head;
    return {rule_.block_size, rule_.num_sink_tokens, thresholds_[index], max_shares_[index], scales_.data() + size_t(index) * key_dim_};
}

int DeltaBlocksPolicy::run(const AttentionProblem& p, int layer, int stream, const AttentionKernels& kernels, ThreadGroup& threads) {
    if (!applies_to(p, layer)) return kSkipped;
    threads.single([&] { runs_ = starts_pass(p, layer, stream); });
    if (!runs_) return kSkipped;
    auto& heads = layers_[layer].streams[stream];
    const int num_pages = merged_keys_.num_pages(p.num_tokens - 1);
    const auto advance = [&](int thread) {
        for (int head = thread; head < num_kv_heads_; head += threads.num_threads)
            heads[head].advance(p, head, merge_rule(layer, head), num_pages);
    };
    const int max_tokens = is_refining() ? ScoreRecorder::kMaxTokens : p.num_tokens;
    threads.parallel_for(advance, [&] { prepare(p, heads), start_tokens(p, 0, std::min(max_tokens, p.num_tokens)); });
    flash_.run(problem_, kernels, threads);
    if (error_stats_.is_on()) return kSkipped;
    if (!is_refining()) return p.num_keys;
    refine_tokens(kernels, threads);
    for (int token = max_tokens; token < p.num_tokens; token += max_tokens) {
        threads.single([&] { start_tokens(p, token, std::min(max_tokens, p.num_tokens - token)); });
        flash_.run(problem_, kernels, threads);
        refine_tokens(kernels, threads);
    }
    threads.single([&] { count_refined(p); });
    return p.num_keys;
}

void DeltaBlocksPolicy::refine_tokens(const AttentionKernels& kernels, ThreadGroup& threads) {
    const int num_workers = flash_.num_workers(threads.num_threads), num_items = problem_.num_tokens * num_kv_heads_;
    threads.parallel_for([&](int thread) {
        for (int item = thread; thread < num_workers && item < num_items; item += num_workers) {
            const int token = item / num_kv_heads_, num_merged = merged_keys_.num_pages(token) * kBlockKeys;
            const int num_refined =
                refiner_.refine(problem_, num_merged, item % num_kv_heads_, token, rule_.refine, kernels, flash_, thread);
            if (token == problem_.num_tokens - 1) num_refined_ += num_refined;
        }
    }, [] {});
}

void DeltaBlocksPolicy::prepare(const AttentionProblem& p, const std::vector<BlockStore>& heads) {
    for (int head = 0; head < num_kv_heads_; ++head) stores_[head] = heads[head].view();
    if (!error_stats_.is_on()) count(p, heads);
}

void DeltaBlocksPolicy::start_tokens(const AttentionProblem& p, int first_token, int num_tokens) {
    problem_ = p;
    problem_.merged_keys = &merged_keys_;
    if (error_stats_.is_on()) return error_stats_.redirect_output(problem_);
    problem_.q += first_token * p.q_token_stride, problem_.out += first_token * p.out_token_stride,
        problem_.mask += first_token * p.mask_token_stride;
    problem_.num_tokens = num_tokens;
    merged_keys_.first_position = first_position_ + first_token;
    num_refined_ = 0;
    if (is_refining()) refiner_.record(problem_);
}

void DeltaBlocksPolicy::count_refined(const AttentionProblem& p) {
    counts_.channels_multiplied += int64_t(num_refined_) * key_dim_;
    counts_.key_bytes_read += num_refined_ * int64_t(stored_bytes(p.k_type, key_dim_));
}

void DeltaBlocksPolicy::count(const AttentionProblem& p, const std::vector<BlockStore>& heads) {
    const int last = p.num_tokens - 1, num_pages = merged_keys_.num_pages(last), num_visible = merged_keys_.first_position + p.num_tokens;
    const int64_t num_merged = int64_t(num_pages) * kBlockKeys, key_bytes = int64_t(stored_bytes(p.k_type, key_dim_));
    const int64_t num_exact = num_visible - num_merged, num_blocks = int64_t(num_pages) * (key_dim_ / rule_.block_size);
    for (const BlockStore& store : heads) {
        const int64_t num_stored = store.num_stored(num_pages);
        counts_.channels_total += int64_t(num_visible) * key_dim_, counts_.channels_merged += num_merged * key_dim_;
        counts_.channels_stored += num_stored, counts_.channels_multiplied += num_stored + num_exact * key_dim_;
        counts_.key_bytes_total += num_visible * key_bytes;
        counts_.key_bytes_read +=
            int64_t(sizeof(uint16_t)) * num_stored + num_blocks + store.assignment_bytes(num_pages) + num_exact * key_bytes;
    }
}

void DeltaBlocksPolicy::measure(const AttentionProblem& p, int layer) {
    if (!error_stats_.is_on() || !applies_to(p, layer)) return;
    if (!runs_) return error_stats_.skip(layer);
    int first_compared = 0;
    while (first_compared < p.num_tokens && merged_keys_.num_pages(first_compared) == 0) ++first_compared;
    error_stats_.compare(p, layer, first_compared);
}

void DeltaBlocksPolicy::read_stored_shares(float* shares) const {
    for (const Layer& layer : layers_)
        for (int head = 0; head < num_kv_heads_; ++head) {
            int64_t num_stored = 0, num_total = 0;
            for (const auto& heads : layer.streams)
                if (!heads.empty()) {
                    num_stored += heads[head].num_stored(heads[head].num_pages());
                    num_total += int64_t(heads[head].num_pages()) * kBlockKeys * key_dim_;
                }
            *shares++ = num_total == 0 ? 1.0f : float(num_stored) / float(num_total);
        }
}

size_t DeltaBlocksPolicy::scratch_bytes() const {
    size_t total = refiner_.num_bytes();
    for (const Layer& layer : layers_)
        for (const auto& heads : layer.streams)
            for (const BlockStore& store : heads) total += store.num_bytes();
    return total;
}

extern "C" int lowtide_policy_set_delta_blocks(CurrentPolicy* policy, const DeltaBlocksRule* rule, const float* thresholds,
                                               const float* max_shares, const float* scales, int num_layers, int num_kv_heads,
                                               int key_dim) {
    return policy->configure<DeltaBlocksPolicy>([=](DeltaBlocksPolicy& blocks) {
        return blocks.set_head_params(*rule, thresholds, max_shares, scales, num_layers, num_kv_heads, key_dim);
    });
}

extern "C" void lowtide_policy_start_delta_blocks(CurrentPolicy* policy, int refine) {
    if (auto* blocks = policy->find<DeltaBlocksPolicy>()) blocks->start_pass({true, true, refine != 0});
}

extern "C" int lowtide_policy_measure_delta_blocks(CurrentPolicy* policy) {
    auto* blocks = policy->find<DeltaBlocksPolicy>();
    return blocks == nullptr ? 0 : error_code([=] { return blocks->start_error_stats(), true; });
}

extern "C" void lowtide_policy_read_delta_blocks_errors(const CurrentPolicy* policy, float* errors, float* squares, float* shares) {
    const auto* blocks = policy->find<DeltaBlocksPolicy>();
    if (blocks == nullptr) return;
    blocks->read_error_stats(errors, squares);
    blocks->read_stored_shares(shares);
}

extern "C" ScoreCounts lowtide_policy_score_counts(const CurrentPolicy* policy) {
    const auto* blocks = policy->find<DeltaBlocksPolicy>();
    return blocks == nullptr ? ScoreCounts{} : blocks->counts();
}

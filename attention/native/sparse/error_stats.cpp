// Compares approximate with dense attention.

#include "sparse/error_stats.h"

#include <algorithm>

void HeadErrorStats::start(int num_layers, int num_kv_heads, int key_dim) {
    num_kv_heads_ = num_kv_heads;
    heads_.assign(size_t(num_layers) * num_kv_heads, {});
    for (HeadStats& stats : heads_) stats.query_squares.assign(key_dim, 0.0);
    is_on_ = true;
}

void HeadErrorStats::reserve(const AttentionProblem& p) {
    const size_t size = is_on_ ? size_t(p.num_tokens) * p.num_heads * p.value_dim : 0;
    if (approximate_.size() < size) approximate_.resize(size);
}

void HeadErrorStats::redirect_output(AttentionProblem& p) {
    p.out = reinterpret_cast<char*>(approximate_.data());
    p.out_head_stride = sizeof(float) * p.value_dim, p.out_token_stride = p.out_head_stride * p.num_heads;
}

void HeadErrorStats::skip(int layer) {
    for (int head = 0; head < num_kv_heads_; ++head) heads_[layer * num_kv_heads_ + head].is_skipped = true;
}

void HeadErrorStats::compare(const AttentionProblem& p, int layer, int first_compared) {
    const int group = p.group_size();
    for (int token = 0; token < p.num_tokens; ++token)
        for (int kv_head = 0; kv_head < num_kv_heads_; ++kv_head) {
            HeadStats& stats = heads_[layer * num_kv_heads_ + kv_head];
            double error = 0.0, norm = 0.0;
            for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                const auto* q = reinterpret_cast<const float*>(p.q + token * p.q_token_stride + head * p.q_head_stride);
                const auto* exact = reinterpret_cast<const float*>(p.out + token * p.out_token_stride + head * p.out_head_stride);
                const float* approximate = approximate_.data() + (size_t(token) * p.num_heads + head) * p.value_dim;
                for (int d = 0; d < p.key_dim; ++d) stats.query_squares[d] += double(q[d]) * q[d] / group;
                for (int d = 0; d < p.value_dim; ++d) {
                    const double difference = double(exact[d]) - approximate[d];
                    error += difference * difference, norm += double(exact[d]) * exact[d];
                }
            }
            ++stats.num_queries;
            if (token < first_compared) continue;
            stats.error += error / std::max(norm, 1e-30), ++stats.num_compared;
        }
}

void HeadErrorStats::read(float* errors, float* query_squares) const {
    for (const HeadStats& stats : heads_) {
        *errors++ = stats.is_skipped ? -1.0f : float(stats.error / double(std::max<int64_t>(stats.num_compared, 1)));
        for (const double square : stats.query_squares) *query_squares++ = float(square / double(std::max<int64_t>(stats.num_queries, 1)));
    }
}

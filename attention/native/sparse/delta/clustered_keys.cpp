// Clusters the keys of a page.

#include "sparse/delta/clustered_keys.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/kv_row.h"
#include "containers.h"

void WardClustering::run(const float* points, int size, int num_sink_tokens, int num_clusters) {
    num_sink_tokens_ = num_sink_tokens;
    measure(points, size);
    for (int i = 0; i < kPageKeys; ++i) sizes_[i] = 1, first_of_[i] = i;
    for (int i = 0; i < kPageKeys; ++i) find_nearest(i);
    for (int left = kPageKeys; left > num_clusters; --left) {
        int best = -1;
        for (int i = num_sink_tokens; i < kPageKeys; ++i) {
            if (sizes_[i] == 0 || nearest_[i] < 0) continue;
            if (best < 0 || distances_[i][nearest_[i]] < distances_[best][nearest_[best]]) best = i;
        }
        if (best < 0) break;
        join_pair(best, nearest_[best]);
    }
    number_clusters();
}

void WardClustering::measure(const float* points, int size) {
    for (int i = 0; i < kPageKeys; ++i)
        for (int j = i + 1; j < kPageKeys; ++j) {
            const float *a = points + i * size, *b = points + j * size;
            float sums[8] = {};
            for (int d = 0; d < size; d += 8)
                for (int lane = 0; lane < 8; ++lane) {
                    const float difference = a[d + lane] - b[d + lane];
                    sums[lane] += difference * difference;
                }
            float sum = 0.0f;
            for (const float lane : sums) sum += lane;
            distances_[i][j] = distances_[j][i] = sum;
        }
}

void WardClustering::find_nearest(int point) {
    nearest_[point] = -1;
    if (point < num_sink_tokens_) return;
    for (int j = point + 1; j < kPageKeys; ++j)
        if (sizes_[j] != 0 && (nearest_[point] < 0 || distances_[point][j] < distances_[point][nearest_[point]])) nearest_[point] = j;
}

// The Lance-Williams update: distances of the union follow from those of its two clusters.
void WardClustering::join_pair(int a, int b) {
    const float size_a = float(sizes_[a]), size_b = float(sizes_[b]), between = distances_[a][b];
    for (int i = num_sink_tokens_; i < kPageKeys; ++i) {
        if (sizes_[i] == 0 || i == a || i == b) continue;
        const float size = float(sizes_[i]);
        distances_[a][i] = distances_[i][a] =
            ((size_a + size) * distances_[a][i] + (size_b + size) * distances_[b][i] - size * between) / (size_a + size_b + size);
    }
    sizes_[a] += sizes_[b], sizes_[b] = 0;
    for (int& first : first_of_)
        if (first == b) first = a;
    for (int i = num_sink_tokens_; i < kPageKeys; ++i) {
        if (sizes_[i] == 0) continue;
        if (i == a || nearest_[i] == a || nearest_[i] == b)
            find_nearest(i);
        else if (i < a &&
                 (distances_[i][a] < distances_[i][nearest_[i]] || (distances_[i][a] == distances_[i][nearest_[i]] && a < nearest_[i])))
            nearest_[i] = a;
    }
}

void WardClustering::number_clusters() {
    int num_clusters = 0;
    for (int i = 0; i < kPageKeys; ++i) {
        if (first_of_[i] == i) cluster_sizes_[num_clusters] = sizes_[i], cluster_of_[i] = uint8_t(num_clusters++);
        else cluster_of_[i] = cluster_of_[first_of_[i]];
    }
}

namespace {

// Values count beside keys: over a page, their variance is scaled to this share of the variance of the keys.
constexpr float kValueShare = 0.5f;
// In units of a score. Keys that are further apart say nothing about each other's scores.
constexpr float kMaxScoreBias = 8.0f;

// The scaled keys of a page, each with its value behind it.
struct PagePoints {
    int key_dim, size;
    float rows[kPageKeys * 2 * kMaxHeadDim];

    // The sum of the variances of some channels.
    float variance(int begin, int end) const {
        float total = 0.0f;
        for (int d = begin; d < end; ++d) {
            float sum = 0.0f, squares = 0.0f;
            for (int i = 0; i < kPageKeys; ++i) sum += rows[i * size + d];
            for (int i = 0; i < kPageKeys; ++i) {
                const float difference = rows[i * size + d] - sum / kPageKeys;
                squares += difference * difference;
            }
            total += squares / kPageKeys;
        }
        return total;
    }
};

void read_points(const uint16_t* keys, const uint16_t* values, int key_dim, int value_dim, const float* scales, PagePoints& points) {
    points.key_dim = key_dim, points.size = key_dim + value_dim;
    for (int i = 0; i < kPageKeys; ++i) {
        float* row = points.rows + i * points.size;
        for (int d = 0; d < key_dim; ++d) row[d] = fp16_to_float(keys[i * key_dim + d]) * scales[d];
        for (int d = 0; d < value_dim; ++d) row[key_dim + d] = fp16_to_float(values[i * value_dim + d]);
    }
    const float of_keys = points.variance(0, key_dim), of_values = points.variance(key_dim, points.size);
    const float factor = of_values > 0.0f ? std::sqrt(kValueShare * of_keys / of_values) : 0.0f;
    for (int i = 0; i < kPageKeys; ++i)
        for (int d = key_dim; d < points.size; ++d) points.rows[i * points.size + d] *= factor;
}

// The mean squared distance of each cluster's keys from their mean, (clusters).
void measure_spread(const PagePoints& points, const WardClustering& clusters, int num_clusters, float* spread) {
    std::fill(spread, spread + num_clusters, 0.0f);
    for (int d = 0; d < points.key_dim; ++d) {
        float means[kPageKeys] = {};
        for (int i = 0; i < kPageKeys; ++i) means[clusters.cluster_of()[i]] += points.rows[i * points.size + d];
        for (int cluster = 0; cluster < num_clusters; ++cluster) means[cluster] /= float(clusters.sizes()[cluster]);
        for (int i = 0; i < kPageKeys; ++i) {
            const float difference = points.rows[i * points.size + d] - means[clusters.cluster_of()[i]];
            spread[clusters.cluster_of()[i]] += difference * difference;
        }
    }
    for (int cluster = 0; cluster < num_clusters; ++cluster) spread[cluster] /= float(clusters.sizes()[cluster]);
}

// Replaces the rows by the mean of each cluster, (clusters, size).
void average(const WardClustering& clusters, int num_clusters, int size, uint16_t* rows) {
    float sums[kPageKeys * kMaxHeadDim];
    std::fill(sums, sums + num_clusters * size, 0.0f);
    for (int i = 0; i < kPageKeys; ++i) {
        float* sum = sums + clusters.cluster_of()[i] * size;
        for (int d = 0; d < size; ++d) sum[d] += fp16_to_float(rows[i * size + d]);
    }
    for (int cluster = 0; cluster < num_clusters; ++cluster) {
        const float share = 1.0f / float(clusters.sizes()[cluster]);
        for (int d = 0; d < size; ++d) rows[cluster * size + d] = float_to_fp16(sums[cluster * size + d] * share);
    }
}

}  // namespace

void ClusteredKeys::reserve(const AttentionProblem& p, int num_clusters, int num_slots, int num_recent) {
    key_dim_ = p.key_dim, value_dim_ = p.value_dim;
    if (num_clusters_ != num_clusters) truncate(0);
    num_clusters_ = num_clusters;
    const size_t clustered = size_t(num_slots / kPageKeys) * num_clusters, rows = clustered + num_recent;
    ensure_size(keys_, rows * key_dim_), ensure_size(values_, rows * value_dim_), ensure_size(biases_, clustered),
        ensure_size(cluster_of_, num_slots);
}

void ClusteredKeys::advance(const AttentionProblem& p, int kv_head, const ClusterRule& rule, int num_pages, int end) {
    if (num_pages < num_pages_) truncate(num_pages * kPageKeys);
    while (num_pages_ < num_pages) {
        append(p, kv_head, (num_pages_ + 1) * kPageKeys);
        cluster_page(rule);
    }
    append(p, kv_head, end);
}

void ClusteredKeys::truncate(int num_slots) {
    if (num_slots >= num_slots_) return;
    const bool among_recent = num_slots >= num_pages_ * kPageKeys;
    num_pages_ = std::min(num_pages_, num_slots / kPageKeys);
    num_slots_ = among_recent ? num_slots : num_pages_ * kPageKeys;  // a page that is clustered has no single keys left
}

int ClusteredKeys::list_keys(int cluster, int32_t* slots) const {
    const int first = cluster / num_clusters_ * kPageKeys;
    int count = 0;
    for (int i = 0; i < kPageKeys; ++i)
        if (cluster_of_[first + i] == cluster % num_clusters_) slots[count++] = first + i;
    return count;
}

void ClusteredKeys::append(const AttentionProblem& p, int kv_head, int end) {
    for (; num_slots_ < end; ++num_slots_) {
        const size_t row = num_keys(), slot = num_slots_;
        row_to_fp16(p.k_type, p.k + kv_head * p.k_head_stride + slot * p.k_key_stride, key_dim_, keys_.data() + row * key_dim_);
        row_to_fp16(p.v_type, p.v + kv_head * p.v_head_stride + slot * p.v_key_stride, value_dim_, values_.data() + row * value_dim_);
    }
}

void ClusteredKeys::cluster_page(const ClusterRule& rule) {
    const int first = num_clustered(), num_recent = num_keys() - first - kPageKeys;
    uint16_t* keys = keys_.data() + size_t(first) * key_dim_;
    uint16_t* biases = biases_.data() + first;
    if (num_clusters_ == kPageKeys) {
        std::fill(biases, biases + kPageKeys, uint16_t(0));
        ++num_pages_;
        return;
    }
    uint16_t* values = values_.data() + size_t(first) * value_dim_;
    PagePoints points;
    read_points(keys, values, key_dim_, value_dim_, rule.scales, points);
    WardClustering clusters;
    clusters.run(points.rows, points.size, num_pages_ == 0 ? rule.num_sink_tokens : 0, num_clusters_);
    std::copy(clusters.cluster_of(), clusters.cluster_of() + kPageKeys, cluster_of_.begin() + size_t(num_pages_) * kPageKeys);
    float spread[kPageKeys];
    measure_spread(points, clusters, num_clusters_, spread);
    average(clusters, num_clusters_, key_dim_, keys), average(clusters, num_clusters_, value_dim_, values);
    for (int cluster = 0; cluster < num_clusters_; ++cluster)
        biases[cluster] =
            float_to_fp16(std::log(float(clusters.sizes()[cluster])) + std::min(rule.score_bias * spread[cluster], kMaxScoreBias));
    move_recent(first + kPageKeys, first + num_clusters_, num_recent);
    ++num_pages_;
}

void ClusteredKeys::move_recent(int from, int to, int count) {
    const auto shift = [=](std::vector<uint16_t>& rows, size_t size) {
        std::memmove(rows.data() + to * size, rows.data() + from * size, sizeof(uint16_t) * size * count);
    };
    shift(keys_, key_dim_), shift(values_, value_dim_);
}

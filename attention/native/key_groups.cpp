#include "key_groups.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "grown.h"
#include "half_rows.h"

namespace {

// Values count beside keys: over a page they are made to vary, in all, by this share of what keys do.
constexpr float kValueShare = 0.5f;
// In a score. Where keys are further apart, their scores say nothing of one another.
constexpr float kMostLift = 8.0f;

// The keys of a page, scaled, each with its value beside it.
struct PagePoints {
    int key_size, size;
    float rows[kPageKeys * 2 * kMaxHeadSize];

    // How far the rows are from their mean, in those channels: the sum of the channels' variances.
    float variance(int begin, int end) const {
        float total = 0.0f;
        for (int d = begin; d < end; ++d) {
            float sum = 0.0f, squares = 0.0f;
            for (int i = 0; i < kPageKeys; ++i) sum += rows[i * size + d];
            for (int i = 0; i < kPageKeys; ++i) {
                const float apart = rows[i * size + d] - sum / kPageKeys;
                squares += apart * apart;
            }
            total += squares / kPageKeys;
        }
        return total;
    }
};

void read_points(const uint16_t* keys, const uint16_t* values, int key_size, int value_size, const float* scales, PagePoints& points) {
    points.key_size = key_size, points.size = key_size + value_size;
    for (int i = 0; i < kPageKeys; ++i) {
        float* row = points.rows + i * points.size;
        for (int d = 0; d < key_size; ++d) row[d] = half_to_float(keys[i * key_size + d]) * scales[d];
        for (int d = 0; d < value_size; ++d) row[key_size + d] = half_to_float(values[i * value_size + d]);
    }
    const float of_keys = points.variance(0, key_size), of_values = points.variance(key_size, points.size);
    const float factor = of_values > 0.0f ? std::sqrt(kValueShare * of_keys / of_values) : 0.0f;
    for (int i = 0; i < kPageKeys; ++i)
        for (int d = key_size; d < points.size; ++d) points.rows[i * points.size + d] *= factor;
}

// The mean square of the distances of each group's keys from their mean, (groups).
void measure_spread(const PagePoints& points, const PageClusters& clusters, int num_groups, float* spread) {
    std::fill(spread, spread + num_groups, 0.0f);
    for (int d = 0; d < points.key_size; ++d) {
        float means[kPageKeys] = {};
        for (int i = 0; i < kPageKeys; ++i) means[clusters.group_of()[i]] += points.rows[i * points.size + d];
        for (int group = 0; group < num_groups; ++group) means[group] /= float(clusters.counts()[group]);
        for (int i = 0; i < kPageKeys; ++i) {
            const float apart = points.rows[i * points.size + d] - means[clusters.group_of()[i]];
            spread[clusters.group_of()[i]] += apart * apart;
        }
    }
    for (int group = 0; group < num_groups; ++group) spread[group] /= float(clusters.counts()[group]);
}

// Means of the rows of each group, (groups, size), in the place of the rows.
void average(const PageClusters& clusters, int num_groups, int size, uint16_t* rows) {
    float sums[kPageKeys * kMaxHeadSize];
    std::fill(sums, sums + num_groups * size, 0.0f);
    for (int i = 0; i < kPageKeys; ++i) {
        float* sum = sums + clusters.group_of()[i] * size;
        for (int d = 0; d < size; ++d) sum[d] += half_to_float(rows[i * size + d]);
    }
    for (int group = 0; group < num_groups; ++group) {
        const float share = 1.0f / float(clusters.counts()[group]);
        for (int d = 0; d < size; ++d) rows[group * size + d] = float_to_half(sums[group * size + d] * share);
    }
}

}  // namespace

void KeyGroups::reserve(const AttentionProblem& p, int num_groups, int num_cells, int num_rows_beside) {
    key_size_ = p.key_size, value_size_ = p.value_size;
    if (num_groups_ != num_groups) cut(0);
    num_groups_ = num_groups;
    const size_t grouped = size_t(num_cells / kPageKeys) * num_groups, rows = grouped + num_rows_beside;
    grow(keys_, rows * key_size_), grow(values_, rows * value_size_), grow(biases_, grouped), grow(group_of_, num_cells);
}

void KeyGroups::advance(const AttentionProblem& p, int kv_head, const GroupRule& rule, int num_pages, int end) {
    if (num_pages < num_pages_) cut(num_pages * kPageKeys);
    while (num_pages_ < num_pages) {
        append(p, kv_head, (num_pages_ + 1) * kPageKeys);
        group_page(rule);
    }
    append(p, kv_head, end);
}

void KeyGroups::cut(int num_cells) {
    if (num_cells >= num_cells_) return;
    const bool among_rows = num_cells >= num_pages_ * kPageKeys;
    num_pages_ = std::min(num_pages_, num_cells / kPageKeys);
    num_cells_ = among_rows ? num_cells : num_pages_ * kPageKeys;  // of a page that was grouped no row is left
}

int KeyGroups::list_keys(int group, int32_t* cells) const {
    const int first = group / num_groups_ * kPageKeys;
    int count = 0;
    for (int i = 0; i < kPageKeys; ++i)
        if (group_of_[first + i] == group % num_groups_) cells[count++] = first + i;
    return count;
}

void KeyGroups::append(const AttentionProblem& p, int kv_head, int end) {
    for (; num_cells_ < end; ++num_cells_) {
        const size_t row = num_keys(), cell = num_cells_;
        copy_row(p.k_type, p.k + kv_head * p.k_head_stride + cell * p.k_key_stride, key_size_, keys_.data() + row * key_size_);
        copy_row(p.v_type, p.v + kv_head * p.v_head_stride + cell * p.v_key_stride, value_size_, values_.data() + row * value_size_);
    }
}

void KeyGroups::group_page(const GroupRule& rule) {
    const int first = num_grouped(), num_beside = num_keys() - first - kPageKeys;
    uint16_t* keys = keys_.data() + size_t(first) * key_size_;
    uint16_t* biases = biases_.data() + first;
    if (num_groups_ == kPageKeys) {
        std::fill(biases, biases + kPageKeys, uint16_t(0));
        ++num_pages_;
        return;
    }
    uint16_t* values = values_.data() + size_t(first) * value_size_;
    PagePoints points;
    read_points(keys, values, key_size_, value_size_, rule.scales, points);
    PageClusters clusters;
    clusters.join(points.rows, points.size, num_pages_ == 0 ? rule.num_fixed : 0, num_groups_);
    std::copy(clusters.group_of(), clusters.group_of() + kPageKeys, group_of_.begin() + size_t(num_pages_) * kPageKeys);
    float spread[kPageKeys];
    measure_spread(points, clusters, num_groups_, spread);
    average(clusters, num_groups_, key_size_, keys), average(clusters, num_groups_, value_size_, values);
    for (int group = 0; group < num_groups_; ++group)
        biases[group] = float_to_half(std::log(float(clusters.counts()[group])) + std::min(rule.lift * spread[group], kMostLift));
    shift_rows(first + kPageKeys, first + num_groups_, num_beside);
    ++num_pages_;
}

void KeyGroups::shift_rows(int from, int to, int count) {
    const auto shift = [=](std::vector<uint16_t>& rows, size_t size) {
        std::memmove(rows.data() + to * size, rows.data() + from * size, sizeof(uint16_t) * size * count);
    };
    shift(keys_, key_size_), shift(values_, value_size_);
}

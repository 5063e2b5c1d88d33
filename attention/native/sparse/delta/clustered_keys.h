#pragma once

// Clustered keys of `delta` by rows (whole tokens): the storage of one KV head, and Ward's clustering.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/problem.h"

// Clusters the keys of a page with Ward's method: it always joins the two clusters whose union increases the sum of
// squared distances from the means the least. The result depends on the page alone.
constexpr int kPageKeys = 64;

class WardClustering {
public:
    // `points` (kPageKeys, size) are scaled so that distances count. The first `num_sink_tokens` stay single;
    // `num_clusters` must be more than that.
    void run(const float* points, int size, int num_sink_tokens, int num_clusters);

    // The cluster of each point, numbered in the order of first members, and the size of each cluster.
    const uint8_t* cluster_of() const { return cluster_of_; }
    const int* sizes() const { return cluster_sizes_; }

private:
    void measure(const float* points, int size);
    void find_nearest(int point);
    void join_pair(int a, int b);
    void number_clusters();

    float distances_[kPageKeys][kPageKeys];  // between clusters, which are named by their first member
    int sizes_[kPageKeys];                   // 0 if the cluster was joined to another one
    int first_of_[kPageKeys];
    int nearest_[kPageKeys];  // among the clusters behind it; -1 if there is none
    int num_sink_tokens_ = 0;
    uint8_t cluster_of_[kPageKeys];
    int cluster_sizes_[kPageKeys];
};

// How the keys of a KV head are clustered. `scales` (key_dim) weight the channels of keys as its queries do.
struct ClusterRule {
    int num_clusters;     // of a page of kPageKeys keys
    int num_sink_tokens;  // the first keys of the cache, which stay single
    float score_bias;     // factor of the mean squared distance from the cluster's mean, added to its score
    const float* scales;
};

// One KV head's cache as clusters. For every page behind the window: the mean key and mean value of each cluster, and
// a bias for its score. Then the tokens behind those pages as they are. Everything is fp16. A page depends on its own
// keys alone, so that truncating and appending again changes nothing.
class ClusteredKeys {
public:
    // Reserves room for that many slots of the cache, with up to `num_recent` tokens behind the last page. Throws
    // std::bad_alloc.
    void reserve(const AttentionProblem& problem, int num_clusters, int num_slots, int num_recent);

    // Brings the store to hold the slots before `end`, with the first `num_pages` pages clustered. It reads what it
    // lacks from the problem's cache.
    void advance(const AttentionProblem& problem, int kv_head, const ClusterRule& rule, int num_pages, int end);

    // Drops the slots from `num_slots` on.
    void truncate(int num_slots);

    int num_clustered() const { return num_pages_ * num_clusters_; }
    int num_slots() const { return num_slots_; }
    int num_keys() const { return num_clustered() + num_slots_ - num_pages_ * kPageKeys; }
    const uint16_t* keys() const { return keys_.data(); }
    const uint16_t* values() const { return values_.data(); }
    // What is added to a cluster's scores, as fp16, (num_clustered): the logarithm of its size, plus the score bias
    // (Jensen term). The mean of exp(score) over keys is more than exp of the mean score, and the bias makes up for
    // it to second order.
    const uint16_t* biases() const { return biases_.data(); }
    // Writes the slots of a cluster's keys, at most kPageKeys, and returns their number.
    int list_keys(int cluster, int32_t* slots) const;
    size_t num_bytes() const {
        return sizeof(uint16_t) * (keys_.capacity() + values_.capacity() + biases_.capacity()) + cluster_of_.capacity();
    }

private:
    void append(const AttentionProblem& problem, int kv_head, int end);
    void cluster_page(const ClusterRule& rule);
    void move_recent(int from, int to, int count);

    std::vector<uint16_t> keys_, values_, biases_;
    std::vector<uint8_t> cluster_of_;  // of each key, numbered inside its page
    int key_dim_ = 0, value_dim_ = 0, num_clusters_ = 0;
    int num_pages_ = 0, num_slots_ = 0;
};

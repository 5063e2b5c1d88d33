#pragma once

#include <cstdint>

// The keys of a page, put into groups of like ones: Ward's method, always joining the two groups whose union
// raises the sum of squared distances from the groups' means the least. What comes out depends on the page's
// keys alone.
constexpr int kPageKeys = 64;

class PageClusters {
public:
    // `points` (kPageKeys, size), scaled so that distances are what counts. The first `num_fixed` stay alone;
    // `num_groups` are wanted, more than `num_fixed`.
    void join(const float* points, int size, int num_fixed, int num_groups);

    // The group of each point, numbered by their first members, and how many points a group has.
    const uint8_t* group_of() const { return group_of_; }
    const int* counts() const { return counts_; }

private:
    void measure(const float* points, int size);
    void find_nearest(int point);
    void join_pair(int a, int b);
    void number_groups();

    float distances_[kPageKeys][kPageKeys];  // between groups that are named by their first members
    int sizes_[kPageKeys];                   // 0 where a group was joined to another
    int first_of_[kPageKeys];
    int nearest_[kPageKeys];  // of those behind it; -1 where there is none
    int num_fixed_ = 0;
    uint8_t group_of_[kPageKeys];
    int counts_[kPageKeys];
};

#include "page_clusters.h"

void PageClusters::join(const float* points, int size, int num_fixed, int num_groups) {
    num_fixed_ = num_fixed;
    measure(points, size);
    for (int i = 0; i < kPageKeys; ++i) sizes_[i] = 1, first_of_[i] = i;
    for (int i = 0; i < kPageKeys; ++i) find_nearest(i);
    for (int left = kPageKeys; left > num_groups; --left) {
        int best = -1;
        for (int i = num_fixed; i < kPageKeys; ++i) {
            if (sizes_[i] == 0 || nearest_[i] < 0) continue;
            if (best < 0 || distances_[i][nearest_[i]] < distances_[best][nearest_[best]]) best = i;
        }
        if (best < 0) break;
        join_pair(best, nearest_[best]);
    }
    number_groups();
}

void PageClusters::measure(const float* points, int size) {
    for (int i = 0; i < kPageKeys; ++i)
        for (int j = i + 1; j < kPageKeys; ++j) {
            const float *a = points + i * size, *b = points + j * size;
            float sums[8] = {};
            for (int d = 0; d < size; d += 8)
                for (int lane = 0; lane < 8; ++lane) {
                    const float apart = a[d + lane] - b[d + lane];
                    sums[lane] += apart * apart;
                }
            float sum = 0.0f;
            for (const float lane : sums) sum += lane;
            distances_[i][j] = distances_[j][i] = sum;
        }
}

void PageClusters::find_nearest(int point) {
    nearest_[point] = -1;
    if (point < num_fixed_) return;
    for (int j = point + 1; j < kPageKeys; ++j)
        if (sizes_[j] != 0 && (nearest_[point] < 0 || distances_[point][j] < distances_[point][nearest_[point]])) nearest_[point] = j;
}

// Lance and Williams' update: the distances of a union follow from those of its parts.
void PageClusters::join_pair(int a, int b) {
    const float size_a = float(sizes_[a]), size_b = float(sizes_[b]), between = distances_[a][b];
    for (int i = num_fixed_; i < kPageKeys; ++i) {
        if (sizes_[i] == 0 || i == a || i == b) continue;
        const float size = float(sizes_[i]);
        distances_[a][i] = distances_[i][a] =
            ((size_a + size) * distances_[a][i] + (size_b + size) * distances_[b][i] - size * between) / (size_a + size_b + size);
    }
    sizes_[a] += sizes_[b], sizes_[b] = 0;
    for (int& first : first_of_)
        if (first == b) first = a;
    for (int i = num_fixed_; i < kPageKeys; ++i) {
        if (sizes_[i] == 0) continue;
        if (i == a || nearest_[i] == a || nearest_[i] == b)
            find_nearest(i);
        else if (i < a && (distances_[i][a] < distances_[i][nearest_[i]] || (distances_[i][a] == distances_[i][nearest_[i]] && a < nearest_[i])))
            nearest_[i] = a;
    }
}

void PageClusters::number_groups() {
    int num_groups = 0;
    for (int i = 0; i < kPageKeys; ++i) {
        if (first_of_[i] == i) counts_[num_groups] = sizes_[i], group_of_[i] = uint8_t(num_groups++);
        else group_of_[i] = group_of_[first_of_[i]];
    }
}

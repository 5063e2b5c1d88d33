// Merges the key blocks of a page.

#include "sparse/delta/block_store.h"

#include <algorithm>
#include <limits>

#include "attention/kv_row.h"

namespace {

// The keys of a page as floats, channels outermost.
struct Page {
    int key_dim;
    float keys[kMaxHeadDim][kBlockKeys];
};

void read_page(const AttentionProblem& p, int kv_head, int first_slot, Page& page) {
    page.key_dim = p.key_dim;
    uint16_t fp16[kMaxHeadDim];
    for (int j = 0; j < kBlockKeys; ++j) {
        row_to_fp16(p.k_type, p.k + kv_head * p.k_head_stride + size_t(first_slot + j) * p.k_key_stride, p.key_dim, fp16);
        for (int d = 0; d < p.key_dim; ++d) page.keys[d][j] = fp16_to_float(fp16[d]);
    }
}

// Merges one block of channels of a page. The first `num_exact` keys are stored whatever they are, and nothing is
// merged into them.
class BlockMerger {
public:
    BlockMerger(const Page& page, const MergeRule& rule, float threshold, int num_exact, int first_channel)
        : keys_(page.keys + first_channel), scales_(rule.scales + first_channel), block_size_(rule.block_size), num_exact_(num_exact) {
        const float max_distance = threshold * threshold * float(rule.block_size);
        for (int key = 0; key < kBlockKeys; ++key)
            if (key < num_exact || !(nearest(key).distance <= max_distance)) store_key(key);
    }

    int count() const { return count_; }

    // The stored vector that stands for a key: its own, or the most similar one.
    int assignment_of(int key) const {
        const int* own = std::lower_bound(stored_, stored_ + count_, key);
        return own < stored_ + count_ && *own == key ? int(own - stored_) : nearest(key).id;
    }

private:
    void store_key(int key) {
        for (int c = 0; c < block_size_; ++c) channels_[c][count_] = keys_[c][key];
        stored_[count_++] = key;
    }

    struct Nearest {
        int id;
        float distance;  // infinity if there is none, or for a key without a finite distance
    };

    Nearest nearest(int key) const {
        float distance[kBlockKeys] = {};
        for (int c = 0; c < block_size_; ++c)
            for (int i = 0; i < count_; ++i) {
                const float scaled = (keys_[c][key] - channels_[c][i]) * scales_[c];
                distance[i] += scaled * scaled;
            }
        Nearest found{0, std::numeric_limits<float>::infinity()};
        for (int i = num_exact_; i < count_; ++i)
            if (distance[i] < found.distance) found = {i, distance[i]};
        return found;
    }

    const float (*keys_)[kBlockKeys];
    const float* scales_;
    int block_size_, num_exact_, count_ = 0;
    int stored_[kBlockKeys];
    float channels_[16][kBlockKeys];
};

// The smallest threshold, within 1 %, that stores no more than the rule's share of the page. Keys without a finite
// distance are stored whatever it is.
float threshold_of(const Page& page, const MergeRule& rule, int num_exact) {
    constexpr int kSteps = 12;
    constexpr float kMin = 1e-3f, kMax = 1e9f;
    const int max_stored = int(rule.max_share * float((kBlockKeys - num_exact) * (page.key_dim / rule.block_size)));
    const auto fits = [&](float threshold) {
        int num_stored = 0;
        for (int first = 0; first < page.key_dim; first += rule.block_size)
            num_stored += BlockMerger(page, rule, threshold, num_exact, first).count() - num_exact;
        return num_stored <= max_stored;
    };
    float high = kMin;
    while (!fits(high) && high < kMax) high *= 4.0f;
    if (high == kMin) return 0.0f;
    float low = high / 4.0f;
    for (int step = 0; step < kSteps && high > 1.01f * low; ++step) {
        const float middle = 0.5f * (low + high);
        (fits(middle) ? high : low) = middle;
    }
    return high;
}

template <class T> void ensure_capacity(std::vector<T>& room, size_t size) {
    if (room.capacity() < size) room.reserve(size);  // not geometrically: pages are counted in the memory plan
}

}  // namespace

void BlockStore::reserve(const AttentionProblem& p, const MergeRule& rule, int num_slots) {
    const size_t num_pages = size_t(num_slots / kBlockKeys), key_dim = size_t(p.key_dim), num_blocks = key_dim / rule.block_size;
    ensure_capacity(counts_, num_pages * num_blocks), ensure_capacity(assignments_, num_pages * num_blocks * kBlockKeys);
    ensure_capacity(values_, num_pages * kBlockKeys * key_dim + kStorePadding);
    ensure_capacity(offsets_, num_pages + 1), ensure_capacity(assignment_bytes_, num_pages + 1), ensure_capacity(exact_, num_pages);
}

void BlockStore::advance(const AttentionProblem& p, int kv_head, const MergeRule& rule, int num_pages) {
    while (this->num_pages() < num_pages) append_page(p, kv_head, rule);
}

void BlockStore::append_page(const AttentionProblem& p, int kv_head, const MergeRule& rule) {
    Page page;
    read_page(p, kv_head, num_pages() * kBlockKeys, page);
    const int num_exact = num_pages() == 0 ? rule.num_sink_tokens : 0;
    const float threshold = rule.max_share < 1.0f ? threshold_of(page, rule, num_exact) : rule.threshold;
    uint64_t exact = ~uint64_t(0);
    uint32_t assignment_bytes = assignment_bytes_.back();
    values_.resize(offsets_.back());
    for (int first = 0; first < p.key_dim; first += rule.block_size) {
        const BlockMerger merger(page, rule, threshold, num_exact, first);
        int sizes[kBlockKeys] = {};
        uint8_t assignments[kBlockKeys];
        for (int key = 0; key < kBlockKeys; ++key) ++sizes[assignments[key] = uint8_t(merger.assignment_of(key))];
        for (int c = 0; c < rule.block_size; ++c) {
            float sums[kBlockKeys] = {};
            for (int key = 0; key < kBlockKeys; ++key) sums[assignments[key]] += page.keys[first + c][key];
            for (int i = 0; i < merger.count(); ++i) values_.push_back(float_to_fp16(sums[i] / float(sizes[i])));
        }
        for (int key = 0; key < kBlockKeys; ++key)
            if (sizes[assignments[key]] > 1) exact &= ~(uint64_t(1) << key);
        const bool is_packed = merger.count() <= kMaxPacked;
        if (is_packed)
            for (int key = 0; key < kBlockKeys / 2; ++key) assignments[key] |= assignments[key + kBlockKeys / 2] << 4;
        assignment_bytes += is_packed ? kBlockKeys / 2 : kBlockKeys;
        counts_.push_back(uint8_t(merger.count())), assignments_.insert(assignments_.end(), assignments, assignments + kBlockKeys);
    }
    offsets_.push_back(uint32_t(values_.size())), assignment_bytes_.push_back(assignment_bytes), exact_.push_back(exact);
    values_.resize(values_.size() + kStorePadding);
}

void BlockStore::truncate(int num_slots) {
    if (num_slots >= num_pages() * kBlockKeys) return;
    const size_t num_blocks = counts_.size() / num_pages(), pages = size_t(num_slots / kBlockKeys);
    counts_.resize(pages * num_blocks), assignments_.resize(pages * num_blocks * kBlockKeys);
    offsets_.resize(pages + 1), assignment_bytes_.resize(pages + 1), exact_.resize(pages);
    values_.resize(offsets_.back() + kStorePadding);
}

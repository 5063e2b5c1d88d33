#include "key_states.h"

#include <algorithm>
#include <limits>

#include "half_rows.h"

namespace {

// The keys of a page as floats, channels outermost.
struct Page {
    int key_size;
    float keys[kMaxHeadSize][kBlockKeys];
};

void read_page(const AttentionProblem& p, int kv_head, int first_cell, Page& page) {
    page.key_size = p.key_size;
    uint16_t halves[kMaxHeadSize];
    for (int j = 0; j < kBlockKeys; ++j) {
        copy_row(p.k_type, p.k + kv_head * p.k_head_stride + size_t(first_cell + j) * p.k_key_stride, p.key_size, halves);
        for (int d = 0; d < p.key_size; ++d) page.keys[d][j] = half_to_float(halves[d]);
    }
}

// What a page sends of one block of channels. The first `num_whole` keys are sent whatever they are like, and stay alone.
class Sent {
public:
    Sent(const Page& page, const StateRule& rule, float threshold, int num_whole, int first_channel)
        : keys_(page.keys + first_channel), scales_(rule.scales + first_channel), block_(rule.block), num_whole_(num_whole) {
        const float most = threshold * threshold * float(rule.block);
        for (int key = 0; key < kBlockKeys; ++key)
            if (key < num_whole || !(nearest(key).off <= most)) send(key);
    }

    int count() const { return count_; }

    // The group of a key: its own where it was sent, or the nearest that was.
    int group_of(int key) const {
        const int* own = std::lower_bound(sent_, sent_ + count_, key);
        return own < sent_ + count_ && *own == key ? int(own - sent_) : nearest(key).group;
    }

private:
    void send(int key) {
        for (int c = 0; c < block_; ++c) channels_[c][count_] = keys_[c][key];
        sent_[count_++] = key;
    }

    struct Nearest {
        int group;
        float off;  // infinity where there is none, as for keys without a finite distance
    };

    Nearest nearest(int key) const {
        float off[kBlockKeys] = {};
        for (int c = 0; c < block_; ++c)
            for (int i = 0; i < count_; ++i) {
                const float scaled = (keys_[c][key] - channels_[c][i]) * scales_[c];
                off[i] += scaled * scaled;
            }
        Nearest found{0, std::numeric_limits<float>::infinity()};
        for (int i = num_whole_; i < count_; ++i)
            if (off[i] < found.off) found = {i, off[i]};
        return found;
    }

    const float (*keys_)[kBlockKeys];
    const float* scales_;
    int block_, num_whole_, count_ = 0;
    int sent_[kBlockKeys];
    float channels_[16][kBlockKeys];
};

// The least threshold, to a hundredth, with which no more than the rule's share of a page is sent; keys without a
// finite distance are sent whatever it is.
float threshold_of(const Page& page, const StateRule& rule, int num_whole) {
    constexpr int kSteps = 12;
    constexpr float kLeast = 1e-3f, kMost = 1e9f;
    const int most_sent = int(rule.share * float((kBlockKeys - num_whole) * (page.key_size / rule.block)));
    const auto fits = [&](float threshold) {
        int num_sent = 0;
        for (int first = 0; first < page.key_size; first += rule.block)
            num_sent += Sent(page, rule, threshold, num_whole, first).count() - num_whole;
        return num_sent <= most_sent;
    };
    float high = kLeast;
    while (!fits(high) && high < kMost) high *= 4.0f;
    if (high == kLeast) return 0.0f;
    float low = high / 4.0f;
    for (int step = 0; step < kSteps && high > 1.01f * low; ++step) {
        const float middle = 0.5f * (low + high);
        (fits(middle) ? high : low) = middle;
    }
    return high;
}

template <class T> void keep_room(std::vector<T>& room, size_t size) {
    if (room.capacity() < size) room.reserve(size);  // no more than that
}

}  // namespace

void KeyStates::reserve(const AttentionProblem& p, const StateRule& rule, int num_cells) {
    const size_t num_pages = size_t(num_cells / kBlockKeys), key_size = size_t(p.key_size), num_blocks = key_size / rule.block;
    keep_room(counts_, num_pages * num_blocks), keep_room(members_, num_pages * num_blocks * kBlockKeys);
    keep_room(values_, num_pages * kBlockKeys * key_size + kSpareHalves);
    keep_room(begins_, num_pages + 1), keep_room(member_bytes_, num_pages + 1), keep_room(exact_, num_pages);
}

void KeyStates::advance(const AttentionProblem& p, int kv_head, const StateRule& rule, int num_pages) {
    while (this->num_pages() < num_pages) append_page(p, kv_head, rule);
}

void KeyStates::append_page(const AttentionProblem& p, int kv_head, const StateRule& rule) {
    Page page;
    read_page(p, kv_head, num_pages() * kBlockKeys, page);
    const int num_whole = num_pages() == 0 ? rule.num_first : 0;
    const float threshold = rule.share < 1.0f ? threshold_of(page, rule, num_whole) : rule.threshold;
    uint64_t exact = ~uint64_t(0);
    uint32_t member_bytes = member_bytes_.back();
    values_.resize(begins_.back());
    for (int first = 0; first < p.key_size; first += rule.block) {
        const Sent sent(page, rule, threshold, num_whole, first);
        int sizes[kBlockKeys] = {};
        uint8_t members[kBlockKeys];
        for (int key = 0; key < kBlockKeys; ++key) ++sizes[members[key] = uint8_t(sent.group_of(key))];
        for (int c = 0; c < rule.block; ++c) {
            float sums[kBlockKeys] = {};
            for (int key = 0; key < kBlockKeys; ++key) sums[members[key]] += page.keys[first + c][key];
            for (int i = 0; i < sent.count(); ++i) values_.push_back(float_to_half(sums[i] / float(sizes[i])));
        }
        for (int key = 0; key < kBlockKeys; ++key)
            if (sizes[members[key]] > 1) exact &= ~(uint64_t(1) << key);
        const bool are_few = sent.count() <= kFewGroups;
        if (are_few)
            for (int key = 0; key < kBlockKeys / 2; ++key) members[key] |= members[key + kBlockKeys / 2] << 4;
        member_bytes += are_few ? kBlockKeys / 2 : kBlockKeys;
        counts_.push_back(uint8_t(sent.count())), members_.insert(members_.end(), members, members + kBlockKeys);
    }
    begins_.push_back(uint32_t(values_.size())), member_bytes_.push_back(member_bytes), exact_.push_back(exact);
    values_.resize(values_.size() + kSpareHalves);
}

void KeyStates::cut(int num_cells) {
    if (num_cells >= num_pages() * kBlockKeys) return;
    const size_t num_blocks = counts_.size() / num_pages(), pages = size_t(num_cells / kBlockKeys);
    counts_.resize(pages * num_blocks), members_.resize(pages * num_blocks * kBlockKeys);
    begins_.resize(pages + 1), member_bytes_.resize(pages + 1), exact_.resize(pages);
    values_.resize(begins_.back() + kSpareHalves);
}

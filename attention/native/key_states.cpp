#include "key_states.h"

#include <algorithm>
#include <cstring>

#include "half_rows.h"

namespace {

// The keys of a page as floats, and the state before it.
struct Page {
    int key_size;
    float keys[kBlockKeys * kMaxHeadSize];
    float before[kMaxHeadSize];
};

void read_page(const AttentionProblem& p, int kv_head, int first_cell, Page& page) {
    page.key_size = p.key_size;
    uint16_t halves[kMaxHeadSize];
    for (int j = 0; j < kBlockKeys; ++j) {
        copy_row(p.k_type, p.k + kv_head * p.k_head_stride + size_t(first_cell + j) * p.k_key_stride, p.key_size, halves);
        for (int d = 0; d < p.key_size; ++d) page.keys[j * p.key_size + d] = half_to_float(halves[d]);
    }
}

// Tells `send(key, block)` of each block that leaves the state, and returns how many of them are of keys behind the
// first `num_whole`, which are sent whole.
template <class Send> int send_blocks(const Page& page, const StateRule& rule, float threshold, int num_whole, const Send& send) {
    const float most = threshold * threshold * float(rule.block);
    int num_sent = 0;
    float state[kMaxHeadSize];
    std::copy(page.before, page.before + page.key_size, state);
    for (int j = 0; j < kBlockKeys; ++j)
        for (int first = 0; first < page.key_size; first += rule.block) {
            const float* key = page.keys + j * page.key_size + first;
            float off = 0.0f;
            for (int c = 0; c < rule.block; ++c) {
                const float scaled = (key[c] - state[first + c]) * rule.scales[first + c];
                off += scaled * scaled;
            }
            if (j >= num_whole && !(off > most)) continue;
            for (int c = 0; c < rule.block; ++c) state[first + c] = key[c];
            num_sent += j >= num_whole;
            send(j, first / rule.block);
        }
    return num_sent;
}

// The least threshold, to a hundredth, with which no more than the rule's share of a page is sent; keys without a
// finite distance are sent whatever it is.
float threshold_of(const Page& page, const StateRule& rule, int num_whole) {
    constexpr int kSteps = 12;
    constexpr float kLeast = 1e-3f, kMost = 1e9f;
    const int most_sent = int(rule.share * float((kBlockKeys - num_whole) * (page.key_size / rule.block)));
    const auto fits = [&](float threshold) {
        return send_blocks(page, rule, threshold, num_whole, [](int, int) {}) <= most_sent;
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
    const size_t num_pages = size_t(num_cells / kBlockKeys), key_size = size_t(p.key_size);
    keep_room(sent_, num_pages * (key_size / rule.block)), keep_room(values_, num_pages * kBlockKeys * key_size + kSpareHalves);
    keep_room(begins_, num_pages + 1), keep_room(num_sent_, num_pages + 1);
}

void KeyStates::advance(const AttentionProblem& p, int kv_head, const StateRule& rule, int num_pages) {
    while (num_pages_ < num_pages) append_page(p, kv_head, rule);
}

// What the last page ends with; zeros where there is none.
void KeyStates::read_last_state(const StateRule& rule, int key_size, float* state) const {
    std::fill(state, state + key_size, 0.0f);
    if (num_pages_ == 0) return;
    const uint16_t* values = values_.data() + begins_[num_pages_ - 1];
    const uint64_t* sent = sent_.data() + size_t(num_pages_ - 1) * (key_size / rule.block);
    for (int d = 0; d < key_size; ++d) {
        const int count = __builtin_popcountll(sent[d / rule.block]);
        state[d] = half_to_float(values[count - 1]), values += count;
    }
}

void KeyStates::append_page(const AttentionProblem& p, int kv_head, const StateRule& rule) {
    Page page;
    read_page(p, kv_head, num_pages_ * kBlockKeys, page);
    read_last_state(rule, p.key_size, page.before);
    const int num_whole = num_pages_ == 0 ? std::max(rule.num_first, 1) : 0, num_blocks = p.key_size / rule.block;
    const float threshold = rule.share < 1.0f ? threshold_of(page, rule, num_whole) : rule.threshold;
    const size_t first_word = sent_.size();
    uint32_t num_sent = 0;
    sent_.resize(first_word + num_blocks);
    send_blocks(page, rule, threshold, num_whole, [&](int key, int block) {
        sent_[first_word + block] |= uint64_t(1) << key;
        ++num_sent;
    });
    values_.resize(begins_.back());
    for (int d = 0; d < p.key_size; ++d) {
        uint64_t& sent = sent_[first_word + d / rule.block];
        if ((sent & 1) == 0) page.keys[d] = page.before[d];  // what the page's first key is seen as
        if (d % rule.block == rule.block - 1) sent |= 1;
        for (uint64_t left = sent | 1; left != 0; left &= left - 1)
            values_.push_back(float_to_half(page.keys[__builtin_ctzll(left) * p.key_size + d]));
    }
    begins_.push_back(uint32_t(values_.size())), num_sent_.push_back(num_sent_.back() + num_sent * rule.block);
    values_.resize(values_.size() + kSpareHalves);
    ++num_pages_;
}

void KeyStates::cut(int num_cells) {
    if (num_cells >= num_pages_ * kBlockKeys) return;
    const size_t num_blocks = sent_.size() / num_pages_;
    num_pages_ = num_cells / kBlockKeys;
    sent_.resize(num_pages_ * num_blocks), begins_.resize(num_pages_ + 1), num_sent_.resize(num_pages_ + 1);
    values_.resize(begins_.back() + kSpareHalves);
}

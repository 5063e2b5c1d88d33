// The mask of a constraint, applied to logits: one bit for each token, eight in a byte, the first token in the lowest.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "c_api.h"

namespace {

constexpr int32_t kWordBits = 64;

// The bits of tokens `first` to `first` + 63; those behind the mask, or from `num_tokens` on, are 0.
uint64_t word_at(const uint8_t* mask, size_t mask_bytes, int32_t first, int32_t num_tokens) {
    uint64_t word = 0;
    const size_t at = static_cast<size_t>(first) / 8;
    if (at >= mask_bytes) return 0;
    const size_t left = mask_bytes - at;
    if (left >= sizeof word) {
        std::memcpy(&word, mask + at, sizeof word);
    } else {
        for (size_t i = 0; i < left; ++i) word |= static_cast<uint64_t>(mask[at + i]) << (8 * i);
    }
    if (num_tokens - first < kWordBits) word &= (uint64_t{1} << (num_tokens - first)) - 1;
    return word;
}

// The largest of 64 logits. Several lanes, so that the compiler computes them with vectors.
float largest_of_word(const float* logits) {
    constexpr int kLanes = 16;
    float lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = logits[lane];
    for (int i = kLanes; i < kWordBits; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            lanes[lane] = logits[i + lane] > lanes[lane] ? logits[i + lane] : lanes[lane];
        }
    }
    float largest = lanes[0];
    for (int lane = 1; lane < kLanes; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
    return largest;
}

}  // namespace

// Returns the legal token with the largest logit, the first of equal ones; -1 where none is legal.
LOWTIDE_API int32_t lowtide_best_legal(const float* logits, int32_t num_tokens, const uint8_t* mask,
                                       size_t mask_bytes) {
    float best = -std::numeric_limits<float>::infinity();
    int32_t best_id = -1;
    for (int32_t first = 0; first < num_tokens; first += kWordBits) {
        uint64_t word = word_at(mask, mask_bytes, first, num_tokens);
        if (word == 0) continue;
        if (best_id < 0) best_id = first + __builtin_ctzll(word);  // all logits may be -infinity
        // Most groups have no larger logit, legal or not: their bits need not be looked at.
        if (num_tokens - first >= kWordBits && !(largest_of_word(logits + first) > best)) continue;
        for (; word != 0; word &= word - 1) {
            const int32_t id = first + __builtin_ctzll(word);
            if (logits[id] > best) {
                best = logits[id];
                best_id = id;
            }
        }
    }
    return best_id;
}

// Writes the legal tokens, ascending, to `ids`, which has room for `capacity`; returns how many there are.
LOWTIDE_API int32_t lowtide_legal_ids(const uint8_t* mask, size_t mask_bytes, int32_t num_tokens, int32_t* ids,
                                      int32_t capacity) {
    int32_t count = 0;
    for (int32_t first = 0; first < num_tokens; first += kWordBits) {
        uint64_t word = word_at(mask, mask_bytes, first, num_tokens);
        if (word == ~uint64_t{0} && count + kWordBits <= capacity) {
            for (int32_t i = 0; i < kWordBits; ++i) ids[count + i] = first + i;
            count += kWordBits;
            continue;
        }
        for (; word != 0; word &= word - 1) {
            if (count < capacity) ids[count] = first + __builtin_ctzll(word);
            ++count;
        }
    }
    return count;
}

#pragma once

// The interface of the attention kernels: one problem as plain pointers and strides, and a table of kernels per
// instruction set. Nothing here knows ggml or onnxruntime.
//
// Files of every instruction set include this header, so its free functions are static: the linker keeps one copy of
// an inline function, and it may keep the one compiled for AVX-512. Members must be small enough to be inlined.
// tests/attention/test_sanitizers.py checks the objects of the kernels.

#include <cstddef>
#include <cstdint>

enum class KvType { f16, q8_0, q4_0, f32 };

// The bytes of a row of `size` elements. ggml quantises in blocks of 32, each with an fp16 scale.
static inline size_t stored_bytes(KvType type, int size) {
    switch (type) {
        case KvType::f16: return size_t(size) * 2;
        case KvType::q8_0: return size_t(size) / 32 * 34;
        case KvType::q4_0: return size_t(size) / 32 * 18;
        case KvType::f32: return size_t(size) * 4;
    }
    return 0;
}

struct MergedKeys;

// Attention of one layer for the tokens of a batch. "Slot" is a token's place in the KV cache.
//
//   q     (num_tokens, num_heads, key_dim)       float32
//   k     (num_slots, num_kv_heads, key_dim)     k_type
//   v     (num_slots, num_kv_heads, value_dim)   v_type
//   mask  (num_tokens, num_slots)                float16, added to the scaled scores
//   out   (num_tokens, num_heads, value_dim)     float32
//
// Strides are in bytes. Optional, if not null:
//
//   selected_slots  (num_keys): key j is in slot selected_slots[j]; else in slot j
//   sinks           (num_heads): a score per head that takes part in the softmax and has no value
//   scores          output: masked scores of the tokens from first_scored_token on, (tokens, num_heads, scores_stride)
//   softmax_stats   output with `scores`, (tokens, num_heads, 2): maximum and 1 / sum of each softmax
//   merged_keys     stands for the keys behind a token's window
//   following       what the thread computes next, from key `following_begin` on: its keys are prefetched
struct AttentionProblem {
    const char* q;
    size_t q_token_stride, q_head_stride;
    const char* k;
    size_t k_key_stride, k_head_stride;
    const char* v;
    size_t v_key_stride, v_head_stride;
    const char* mask;
    size_t mask_token_stride;
    char* out;
    size_t out_token_stride, out_head_stride;
    KvType k_type, v_type;
    int num_tokens, num_heads, num_kv_heads, num_keys, key_dim, value_dim;
    float scale, softcap;
    const float* sinks;
    const int32_t* selected_slots;
    float *scores, *softmax_stats;
    int first_scored_token, scores_stride;
    int use_bf16;  // whether the tokens of a prompt may be multiplied in bfloat16
    const MergedKeys* merged_keys;
    const AttentionProblem* following;
    int following_begin;

    int group_size() const { return num_heads / num_kv_heads; }
};

constexpr uint16_t kMaskedKey = 0xfc00;  // -inf in a mask

// Kernels process keys in blocks at fixed positions, and blocks in chunks. So the order of every sum depends on the
// token alone, not on its batch or on the number of threads.
constexpr int kBlockKeys = 64;
constexpr int kChunkKeys = 256;
constexpr int kPrefetchDistance = 2 * kBlockKeys;  // kernels wait for memory, so they ask for keys this far ahead
constexpr int kMaxHeadDim = 256;
constexpr int kMaxDraftTokens = 32;  // a batch of more tokens is a part of a prompt
constexpr int kTileTokens = 64;  // the most tokens of one kernel call

// One KV head's merged keys (BlockStore), in pages of kBlockKeys keys. A page splits the channels into blocks. In
// each block it stores a few vectors, and every key of the page is assigned to one of them. `values` has the stored
// vectors as fp16: blocks outermost, then channels, then vectors. Kernels may read kStorePadding values past the end.
// With up to kMaxPacked vectors, an assignment takes four bits: key i of the page's first half is in the lower bits
// of byte i, key i of its second half in the upper ones.
constexpr int kStorePadding = 16, kMaxPacked = 16;

struct BlockStoreView {
    const uint8_t* counts;       // (pages, blocks)
    const uint8_t* assignments;  // (pages, blocks, kBlockKeys); a packed block uses the first half
    const uint16_t* values;
    const uint32_t* offsets;  // (pages), where a page begins in `values`
    const uint64_t* exact;    // (pages), one bit per key: whether all its blocks are its own, so that nothing is approximated
};

struct MergedKeys {
    const BlockStoreView* stores;  // (num_kv_heads)
    int block_size;                // channels of a block
    int first_position;            // of the first token; each token sees one slot more than the token before
    int window;

    // How many pages are entirely behind the window of a token.
    int num_pages(int token) const {
        const int behind = first_position + token + 1 - window;
        return behind > 0 ? behind / kBlockKeys : 0;
    }
};

// Buffers beside the KV cache grow in these steps: llama.cpp pads the KV slots that a batch sees to the same number.
constexpr int kSlotPadding = 256;

static inline int padded_to_slots(int num_keys) { return (num_keys + kSlotPadding - 1) / kSlotPadding * kSlotPadding; }

static inline int padded_to_blocks(int num_keys) { return (num_keys + kBlockKeys - 1) / kBlockKeys * kBlockKeys; }

// The partial result of one query: the maximum score, the sum of exponentials and the weighted sum of values, in
// floats.
static inline int partial_floats(const AttentionProblem& problem) { return 2 + problem.value_dim; }

// Scratch of one thread in floats: a block of keys, a block of values, the masks of the tokens over the block, and
// the scores of one query tile.
constexpr size_t kScratchFloats = 2 * kBlockKeys * kMaxHeadDim + (kTileTokens + 8) * kBlockKeys;

// Attends the tokens [token_begin, token_end), at most kTileTokens, with the heads of `kv_head` to the keys
// [key_begin, key_end), which start at a block and stay in one chunk. Adds to one partial result per token and head,
// tokens outermost.
using AttendKeys = void (*)(const AttentionProblem& problem, int kv_head, int token_begin, int token_end,
                            int key_begin, int key_end, float* scratch, float* partials);

// Adds to `weights` the softmax weight of each of `count` scores, a multiple of kBlockKeys. `softmax_stats` is that
// query's maximum and 1 / sum.
using AddWeights = void (*)(const float* scores, const float* softmax_stats, int count, float* weights);

// `attend_keys_bf16` is attend_keys with bfloat16 multiplications, summed in float32. It is not exact, and null if
// the processor has no such instructions.
struct AttentionKernels {
    const char* name;
    AttendKeys attend_keys;
    AddWeights add_weights;
    AttendKeys attend_keys_bf16;
};

// Null if the library was not built for that instruction set.
const AttentionKernels* avx512_attention_kernels();
AttendKeys avx512_bf16_attend_keys();
const AttentionKernels* avx2_attention_kernels();
const AttentionKernels* portable_attention_kernels();

// The best kernels for this processor, or those of that name. Null if there are none.
const AttentionKernels* find_attention_kernels(const char* name);

// Which slots the tokens of a batch see, if they see a prefix of the cache.

// How many slots a token sees, if they are the first ones; else -1.
static inline int num_visible(const AttentionProblem& p, int token) {
    const auto* mask = reinterpret_cast<const uint16_t*>(p.mask + token * p.mask_token_stride);
    int visible = p.num_keys;
    while (visible > 0 && mask[visible - 1] == kMaskedKey) --visible;
    uint16_t any = 0;
    for (int j = 0; j < visible; ++j) any |= mask[j];
    return any == 0 ? visible : -1;
}

// The slot of the first token, if every token sees its own slot and all before it; else negative.
static inline int first_position(const AttentionProblem& p) {
    const int first = num_visible(p, p.num_tokens - 1) - p.num_tokens;
    bool is_prefix = first >= 0;
    for (int token = 0; is_prefix && token < p.num_tokens - 1; ++token) is_prefix = num_visible(p, token) == first + token + 1;
    return is_prefix ? first : -1;
}

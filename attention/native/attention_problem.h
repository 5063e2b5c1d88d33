#pragma once

#include <cstddef>
#include <cstdint>

// One attention node as plain pointers and strides: the kernels know no ggml.
//
// Shapes: q (num_rows, num_heads, key_size) f32; k (cells, num_kv_heads, key_size) and v (cells,
// num_kv_heads, value_size) of `k_type` and `v_type`; mask (num_rows, cells) f16, added to the scaled scores;
// out (num_rows, num_heads, value_size) f32. Strides are in bytes. Where `selected` is not null, key j of
// `num_keys` lies in cell selected[j]; else in cell j. `sinks`, where not null, has a score for each head
// that takes part in the softmax and has no value. Where `scores` is not null, the masked scores of the rows
// from `first_scored_row` on are left there, (scored rows, num_heads, scores_stride) floats, and in `totals`,
// (scored rows, num_heads, 2), the maximum and 1 / the sum of each softmax.
// Where `states` is not null, keys behind a row's window are states of our own instead.
enum class KvType { f16, q8_0, q4_0, f32 };

// What a row of `size` elements takes; ggml quantises in blocks of 32, with a scale each.
static inline size_t stored_bytes(KvType type, int size) {
    switch (type) {
        case KvType::f16: return size_t(size) * 2;
        case KvType::q8_0: return size_t(size) / 32 * 34;
        case KvType::q4_0: return size_t(size) / 32 * 18;
        case KvType::f32: return size_t(size) * 4;
    }
    return 0;
}

struct StatesOfRows;

struct AttentionProblem {
    const char* q;
    size_t q_row_stride, q_head_stride;
    const char* k;
    size_t k_key_stride, k_head_stride;
    const char* v;
    size_t v_key_stride, v_head_stride;
    const char* mask;
    size_t mask_row_stride;
    char* out;
    size_t out_row_stride, out_head_stride;
    KvType k_type, v_type;
    int num_rows, num_heads, num_kv_heads, num_keys, key_size, value_size;
    float scale, softcap;
    const float* sinks;
    const int32_t* selected;
    float *scores, *totals;
    int first_scored_row, scores_stride;
    int rounded;  // whether a prompt's rows may be multiplied in bfloat16
    const StatesOfRows* states;

    int group_size() const { return num_heads / num_kv_heads; }
    int cell_of(int key) const { return selected == nullptr ? key : selected[key]; }
};

constexpr uint16_t kHiddenKey = 0xfc00;  // -inf in a mask

// Keys are taken in blocks, at absolute positions, and blocks in chunks: the order of every sum depends
// on the row alone, never on the batch it came in or on the number of threads.
constexpr int kBlockKeys = 64;
constexpr int kChunkKeys = 256;
constexpr int kMaxHeadSize = 256;
constexpr int kDraftRows = 32;  // a pass of more rows is a prompt's
constexpr int kTileRows = 64;   // the most rows of one call of a kernel

// One KV head's keys as states (KeyStates), page by page of kBlockKeys keys. Of each block of channels a page has some
// groups of keys that are seen alike there: their number, which one each key is in, and, from `begins` on, what they are
// seen as, as halves: blocks outermost, then channels, then groups. So many halves more than there are may be read. Up to
// kFewGroups half a byte says which one, of a key in the page's first half the lower one of its byte, and of the key
// that lies half a page behind it the upper one.
constexpr int kSpareHalves = 16, kFewGroups = 16;

struct StateStore {
    const uint8_t* counts;   // (pages, blocks)
    const uint8_t* members;  // (pages, blocks, kBlockKeys), of few groups the first half of it
    const uint16_t* values;
    const uint32_t* begins;  // (pages)
    const uint64_t* exact;   // (pages), the keys that are seen as they are, as bits
};

struct StatesOfRows {
    const StateStore* stores;  // (num_kv_heads)
    int block;                 // channels of a block
    int first_position;        // of the first row; each row sees one cell more than the one before
    int window;

    // How many pages lie behind the window of a row.
    int num_pages(int row) const {
        const int behind = first_position + row + 1 - window;
        return behind > 0 ? behind / kBlockKeys : 0;
    }
};

// What is kept beside a cache gets room in steps of so many cells, as llama.cpp's own is seen.
constexpr int kCellStep = 256;

static inline int padded_to_cells(int num_keys) { return (num_keys + kCellStep - 1) / kCellStep * kCellStep; }

static inline int padded_to_blocks(int num_keys) { return (num_keys + kBlockKeys - 1) / kBlockKeys * kBlockKeys; }

// What one query head of one row has seen so far: maximum, sum of exponentials, and the weighted sum of
// values, (2 + value_size) floats.
static inline int partial_floats(const AttentionProblem& problem) { return 2 + problem.value_size; }

// Scratch of one thread, in floats: a block of keys and one of values, the rows' masks over the block, and
// the scores of a few heads.
constexpr size_t kScratchFloats = 2 * kBlockKeys * kMaxHeadSize + (kTileRows + 8) * kBlockKeys;

// Attends the rows [row_begin, row_end), at most kTileRows, with the heads of `kv_head` to the keys
// [key_begin, key_end), which begin a block and lie in one chunk. Adds to a partial for each row and head of
// the group, rows outermost; `start_partial` makes one that has seen nothing.
using AttendKeys = void (*)(const AttentionProblem& problem, int kv_head, int row_begin, int row_end,
                            int key_begin, int key_end, float* scratch, float* partials);

// Adds to `weights` what each of `count` scores, a multiple of kBlockKeys, weighs in its softmax: `totals` is
// the line's maximum and 1 / sum.
using AddWeights = void (*)(const float* scores, const float* totals, int count, float* weights);

// `attend_rounded` is attend_keys with products of many rows in bfloat16, summed in f32: not exact, and null
// where the processor has no such units.
struct KernelSet {
    const char* name;
    AttendKeys attend_keys;
    AddWeights add_weights;
    AttendKeys attend_rounded;
};

// Each is null where the library was not built for it.
const KernelSet* avx512_kernels();
AttendKeys avx512_bf16_attend();
const KernelSet* avx2_kernels();
const KernelSet* portable_kernels();

// The best set for this processor, or the named one; null where there is none.
const KernelSet* find_kernels(const char* name);

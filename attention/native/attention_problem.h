#pragma once

#include <cstddef>
#include <cstdint>

// One attention node as plain pointers and strides: the kernels know no ggml.
//
// Shapes: q (num_rows, num_heads, key_size) f32; k (num_keys, num_kv_heads, key_size) and
// v (num_keys, num_kv_heads, value_size) of `kv_type`; mask (num_rows, num_keys) f16, added to the scaled
// scores; out (num_rows, num_heads, value_size) f32. Strides are in bytes.
enum class KvType { f16, q8_0, q4_0 };

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

    int group_size() const { return num_heads / num_kv_heads; }
};

// Keys are taken in blocks, at absolute positions, and blocks in chunks: the order of every sum depends
// on the row alone, never on the batch it came in or on the number of threads.
constexpr int kBlockKeys = 64;
constexpr int kChunkKeys = 512;
constexpr int kMaxHeadSize = 256;

// What one query head of one row has seen so far: maximum, sum of exponentials, and the weighted sum of
// values, (2 + value_size) floats.
inline int partial_floats(const AttentionProblem& problem) { return 2 + problem.value_size; }

// Scratch of one thread, in floats: a block of keys and one of values, and the scores of two heads.
constexpr size_t kScratchFloats = 2 * kBlockKeys * kMaxHeadSize + 4 * kBlockKeys;

// Attends the rows [row_begin, row_end) with the heads of `kv_head` to the keys [key_begin, key_end),
// which begin a block and lie in one chunk. Adds to a partial for each row and head of the group, rows
// outermost; `start_partial` makes one that has seen nothing.
using AttendKeys = void (*)(const AttentionProblem& problem, int kv_head, int row_begin, int row_end,
                            int key_begin, int key_end, float* scratch, float* partials);

struct KernelSet {
    const char* name;
    AttendKeys attend_keys;
};

// Each is null where the library was not built for it.
const KernelSet* avx512_kernels();
const KernelSet* avx2_kernels();
const KernelSet* portable_kernels();

// The best set for this processor, or the named one; null where there is none.
const KernelSet* find_kernels(const char* name);

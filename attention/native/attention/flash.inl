// The exact attention kernel. Each file of an instruction set defines VECTOR_FLOATS (the lanes of a vector), includes
// this file and is compiled with that set's flags.
//
// Keys are transposed in registers: a vector holds one channel of W keys, so scores need no sums across lanes. A tile
// of a few queries (a query is one head of one token) reads the keys as they are stored. Many queries share one block
// that is converted to floats once. Every query sums in the same order either way. The softmax is the online softmax
// (Milakov and Gimelshein 2018).

#include "attention/problem.h"
#include "attention/query_tile.h"
#include "simd.h"
#include "sparse/delta/merged_scores.h"

namespace {

template <KvType Type> struct StoredValues {
    const KeyBlock &block, &next;
    size_t num_bytes;
    Floats at(int key, int channel) const { return KvRow<Type>::load(block.values[key], channel); }
    void prefetch_next(int key) const { prefetch(next.values[key], num_bytes); }
};

struct FloatValues {
    const float* values; int size;
    Floats at(int key, int channel) const { return load(values + key * size + channel); }
    void prefetch_next(int) const {}
};

// Adds weights (N, kBlockKeys) times values to V vectors of the partials, from `channel` on. It never reads the value
// of a masked key, which may be anything.
template <int N, int V, class Values>
void accumulate_channels(const Values& values, const float* weights, const QueryTile& tile, int channel, int count, bool all_visible,
                         const float* factors) {
    Floats sums[N][V];
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < V; ++i) sums[n][i] = load(tile.partials[n] + 2 + channel + i * W) * factors[n];
    for (int j = 0; j < count; ++j) {
        if (channel == 0) values.prefetch_next(j);
        if (!all_visible && tile.bias[0][j] == kMinusInfinity) continue;
        Floats v[V];
        for (int i = 0; i < V; ++i) v[i] = values.at(j, channel + i * W);
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < V; ++i) sums[n][i] += weights[n * kBlockKeys + j] * v[i];
    }
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < V; ++i) store(tile.partials[n] + 2 + channel + i * W, sums[n][i]);
}

template <int N, class Values>
void softmax_and_accumulate(const AttentionProblem& p, const Values& values, const QueryTile& tile, int count, bool all_visible,
                            float* scores) {
    float factors[N];
    softmax_tile<N>(p, tile, scores, factors);
    constexpr int V = num_sum_vectors(N);
    int channel = 0;
    for (; channel + V * W <= p.value_dim; channel += V * W)
        accumulate_channels<N, V>(values, scores, tile, channel, count, all_visible, factors);
    for (; channel < p.value_dim; channel += W)
        accumulate_channels<N, 1>(values, scores, tile, channel, count, all_visible, factors);
}

// A block of keys for a few queries, read as it is stored.
struct StoredBlock {
    const AttentionProblem& p;
    const KeyBlock &block, &next;
    static constexpr int kMaxQueries = kMaxDirectQueries;

    template <int N> void attend(const QueryTile& tile, bool all_visible, float* scores) const {
        switch (p.k_type) {
            case KvType::f16: score_stored<KvType::f16, N>(block, next, tile, p.key_dim, scores); break;
            case KvType::q8_0: score_stored<KvType::q8_0, N>(block, next, tile, p.key_dim, scores); break;
            case KvType::q4_0: score_stored<KvType::q4_0, N>(block, next, tile, p.key_dim, scores); break;
            case KvType::f32: score_stored<KvType::f32, N>(block, next, tile, p.key_dim, scores); break;
        }
        accumulate<N>(tile, all_visible, scores);
    }
    template <int N> void accumulate(const QueryTile& tile, bool all_visible, float* scores) const {
        switch (p.v_type) {
            case KvType::f16: return accumulate_stored<KvType::f16, N>(tile, all_visible, scores);
            case KvType::q8_0: return accumulate_stored<KvType::q8_0, N>(tile, all_visible, scores);
            case KvType::q4_0: return accumulate_stored<KvType::q4_0, N>(tile, all_visible, scores);
            case KvType::f32: return accumulate_stored<KvType::f32, N>(tile, all_visible, scores);
        }
    }
    template <KvType Type, int N> void accumulate_stored(const QueryTile& tile, bool all_visible, float* scores) const {
        const StoredValues<Type> values{block, next, KvRow<Type>::num_bytes(p.value_dim)};
        softmax_and_accumulate<N>(p, values, tile, block.count, all_visible, scores);
    }
};

// A block of keys for many queries: keys transposed (key_dim, kBlockKeys) and values (kBlockKeys, value_dim), as
// floats.
struct ConvertedBlock {
    const AttentionProblem& p;
    const KeyBlock &block, &next;
    float *keys, *values;
    static constexpr int kMaxQueries = kTileQueries;
    static constexpr bool kExact = true;

    template <KvType Type> void fill_keys() const {
        for (int j = 0; j < kBlockKeys; j += W)
            for (int d = 0; d < p.key_dim; d += W) {
                if (d == 0)
                    for (int i = 0; i < W; ++i) prefetch(next.keys[j + i], KvRow<Type>::num_bytes(p.key_dim));
                Floats channels[W];
                for (int i = 0; i < W; ++i) channels[i] = KvRow<Type>::load(block.keys[j + i], d);
                transpose(channels);
                for (int c = 0; c < W; ++c) store(keys + (d + c) * kBlockKeys + j, channels[c]);
            }
    }
    template <KvType Type> void fill_values() const {
        for (int j = 0; j < block.count; ++j) {
            prefetch(next.values[j], KvRow<Type>::num_bytes(p.value_dim));
            for (int d = 0; d < p.value_dim; d += W) store(values + j * p.value_dim + d, KvRow<Type>::load(block.values[j], d));
        }
    }
    void fill() const {
        switch (p.k_type) {
            case KvType::f16: fill_keys<KvType::f16>(); break;
            case KvType::q8_0: fill_keys<KvType::q8_0>(); break;
            case KvType::q4_0: fill_keys<KvType::q4_0>(); break;
            case KvType::f32: fill_keys<KvType::f32>(); break;
        }
        fill_values();
    }
    void fill_values() const {
        switch (p.v_type) {
            case KvType::f16: return fill_values<KvType::f16>();
            case KvType::q8_0: return fill_values<KvType::q8_0>();
            case KvType::q4_0: return fill_values<KvType::q4_0>();
            case KvType::f32: return fill_values<KvType::f32>();
        }
    }
    template <int N> void attend(const QueryTile& tile, bool all_visible, float* scores) const {
        score_transposed<N>(keys, tile, p.key_dim, scores);
        accumulate<N>(tile, all_visible, scores);
    }
    template <int N> void accumulate(const QueryTile& tile, bool all_visible, float* scores) const {
        softmax_and_accumulate<N>(p, FloatValues{values, p.value_dim}, tile, block.count, all_visible, scores);
    }
};

// Either kind of block, with merged keys (sparse/delta/block_store.h) in place of the keys.
template <class Block> struct MergedBlock {
    const Block& block;
    const MergedPage page;
    static constexpr int kMaxQueries = Block::kMaxQueries;
    template <int N> void attend(const QueryTile& tile, bool all_visible, float* scores) const {
        score_merged<N>(page, block.p, tile, scores);
        block.template accumulate<N>(tile, all_visible, scores);
    }
};

template <class Block> void attend_tile(const Block& block, const QueryTile& tile, bool all_visible, float* scores) {
    switch (tile.count) {
        case 1: return block.template attend<1>(tile, all_visible, scores);
        case 2: return block.template attend<2>(tile, all_visible, scores);
        case 3: return block.template attend<3>(tile, all_visible, scores);
        case 4: return block.template attend<4>(tile, all_visible, scores);
        case 5: return block.template attend<5>(tile, all_visible, scores);
        case 6: return block.template attend<6>(tile, all_visible, scores);
    }
    if constexpr (Block::kMaxQueries > 6) {
        if (tile.count == 7) return block.template attend<7>(tile, all_visible, scores);
        if (tile.count == 8) return block.template attend<8>(tile, all_visible, scores);
    }
}

// Builds query tiles from the tokens of one kernel call and the heads of its KV head.
struct TokenRange {
    const AttentionProblem& p;
    int kv_head, token_begin;
    float* partials;

    float* scores_out(int token, int head, int key) const {
        if (p.scores == nullptr || token < p.first_scored_token) return nullptr;
        return p.scores + (size_t(token - p.first_scored_token) * p.num_heads + head) * p.scores_stride + key;
    }
    void add(QueryTile& tile, int query, const float* bias, int key) const {
        const int token = token_begin + query / p.group_size(), head = kv_head * p.group_size() + query % p.group_size();
        tile.q[tile.count] = reinterpret_cast<const float*>(p.q + token * p.q_token_stride + head * p.q_head_stride);
        tile.bias[tile.count] = bias;
        tile.partials[tile.count] = partials + query * partial_floats(p);
        tile.scores_out[tile.count] = scores_out(token, head, key);
        ++tile.count;
    }
    // Tokens that see the whole block share tiles. A token that sees only a part of it gets its own.
    template <class Block>
    void attend(const Block& kernel, const KeyBlock& block, const BlockMask* masks, int num_tokens, float* scores) const {
        const auto sees_all = [&](int i) { return masks[i].num_visible == block.count; };
        for (int first = 0, end = 0; first < num_tokens; first = end) {
            end = first + 1;
            if (masks[first].num_visible == 0) {
                export_masked(first, block.begin);
                continue;
            }
            while (sees_all(first) && end < num_tokens && sees_all(end)) ++end;
            for (int query = first * p.group_size(); query < end * p.group_size();) {
                QueryTile tile;
                tile.count = 0;
                for (; query < end * p.group_size() && tile.count < Block::kMaxQueries; ++query)
                    add(tile, query, masks[query / p.group_size()].bias, block.begin);
                attend_tile(kernel, tile, sees_all(first), scores);
            }
        }
    }
    // For tokens that have the whole block behind their window: nothing is masked.
    template <class Block> void attend_unmasked(const Block& kernel, int key, int first_token, int num_tokens, float* scores) const {
        for (int query = first_token * p.group_size(), end = num_tokens * p.group_size(); query < end;) {
            QueryTile tile;
            tile.count = 0;
            for (; query < end && tile.count < Block::kMaxQueries; ++query) add(tile, query, kNoBias, key);
            attend_tile(kernel, tile, true, scores);
        }
    }
    void export_masked(int index, int key) const {
        for (int head = kv_head * p.group_size(); head < (kv_head + 1) * p.group_size(); ++head) {
            float* scores = scores_out(token_begin + index, head, key);
            for (int j = 0; scores != nullptr && j < kBlockKeys; ++j) scores[j] = kMinusInfinity;
        }
    }
};

// How many of the first tokens of a call do not have this page of keys behind their window, so that they attend to
// the exact keys.
inline int num_exact_tokens(const AttentionProblem& p, int token_begin, int num_tokens, int page) {
    int num_exact = 0;
    while (num_exact < num_tokens && (p.merged_keys == nullptr || p.merged_keys->num_pages(token_begin + num_exact) <= page)) ++num_exact;
    return num_exact;
}

// The block of keys that is prefetched while another is computed: further on, or where the next problem begins.
inline void locate_upcoming(const AttentionProblem& p, int kv_head, int begin, KeyBlock& block) {
    const int ahead = begin + kPrefetchDistance;
    if (ahead < p.num_keys) return locate(p, kv_head, ahead, block);
    const int beyond = p.following_begin + ahead - padded_to_blocks(p.num_keys);
    if (p.following != nullptr && beyond < p.following->num_keys) return locate(*p.following, kv_head, beyond, block);
    locate(p, kv_head, begin, block);
}

template <class TiledBlock>
void attend_blocks(const AttentionProblem& p, int kv_head, int token_begin, int token_end, int key_begin, int key_end, float* scratch,
                   float* partials) {
    float* keys = scratch;
    float* values = keys + kBlockKeys * kMaxHeadDim;
    float* bias = values + kBlockKeys * kMaxHeadDim;
    float* scores = bias + kTileTokens * kBlockKeys;
    const int num_tokens = token_end - token_begin;
    const bool is_direct = TiledBlock::kExact && num_tokens * p.group_size() <= kMaxDirectQueries;
    const TokenRange tokens{p, kv_head, token_begin, partials};
    KeyBlock block, next;
    for (int begin = key_begin; begin < key_end; begin += kBlockKeys) {
        locate(p, kv_head, begin, block);
        locate_upcoming(p, kv_head, begin, next);
        const int num_exact = num_exact_tokens(p, token_begin, num_tokens, begin / kBlockKeys);
        if (num_exact < num_tokens) {
            const MergedPage page = merged_page(p, kv_head, begin / kBlockKeys);
            const StoredBlock stored{p, block, next};
            const ConvertedBlock converted{p, block, next, keys, values};
            if (is_direct) {
                tokens.attend_unmasked(MergedBlock<StoredBlock>{stored, page}, begin, num_exact, num_tokens, scores);
            } else {
                converted.fill_values();
                tokens.attend_unmasked(MergedBlock<ConvertedBlock>{converted, page}, begin, num_exact, num_tokens, scores);
            }
        }
        if (num_exact == 0) continue;
        BlockMask masks[kTileTokens];
        bool seen = false;
        for (int i = 0; i < num_exact; ++i) {
            masks[i] = read_mask(p, token_begin + i, block, bias + i * kBlockKeys);
            seen |= masks[i].num_visible != 0;
        }
        if (is_direct || !seen) {
            tokens.attend(StoredBlock{p, block, next}, block, masks, num_exact, scores);
        } else {
            const TiledBlock converted{p, block, next, keys, values};
            converted.fill();
            tokens.attend(converted, block, masks, num_exact, scores);
        }
    }
}

// TidalDecode selects keys by this: the softmax weight of every key, summed over queries.
[[maybe_unused]] void add_weights(const float* scores, const float* softmax_stats, int count, float* weights) {
    for (int j = 0; j < count; j += W)
        store(weights + j, load(weights + j) + exp_nonpositive(load(scores + j) - softmax_stats[0]) * softmax_stats[1]);
}

}  // namespace

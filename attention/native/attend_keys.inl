// The exact attention kernel, once for each instruction set: included by files that define VECTOR_FLOATS
// (lanes of a vector) and compiled with that set's flags.
//
// Keys are turned in registers, so that a vector holds one channel of as many keys: scores need no sums
// across lanes. A few lines (query heads of rows) take the block as it is stored; many share one that is converted
// once. Either way each line sums in the same order. Softmax is the online one (Milakov and Gimelshein 2018).

#include "key_block.h"
#include "key_scores.h"
#include "lines.h"
#include "state_scores.h"
#include "vectors.h"

namespace {

template <KvType Type> struct StoredValues {
    const KeyBlock &block, &ahead;
    size_t num_bytes;
    Floats at(int key, int channel) const { return Rows<Type>::load(block.values[key], channel); }
    void ask_ahead(int key) const { prefetch(ahead.values[key], num_bytes); }
};

struct FloatValues {
    const float* values; int size;
    Floats at(int key, int channel) const { return load(values + key * size + channel); }
    void ask_ahead(int) const {}
};

// Adds weights (N, kBlockKeys) times values to V vectors of the partials, from `channel` on. The value of a
// hidden key is not touched, whatever it holds.
template <int N, int V, class Values>
void weigh_channels(const Values& values, const float* weights, const Lines& lines, int channel, int count, bool all_visible,
                    const float* factors) {
    Floats sums[N][V];
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < V; ++i) sums[n][i] = load(lines.partials[n] + 2 + channel + i * W) * factors[n];
    for (int j = 0; j < count; ++j) {
        if (channel == 0) values.ask_ahead(j);
        if (!all_visible && lines.bias[0][j] == kMinusInfinity) continue;
        Floats v[V];
        for (int i = 0; i < V; ++i) v[i] = values.at(j, channel + i * W);
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < V; ++i) sums[n][i] += weights[n * kBlockKeys + j] * v[i];
    }
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < V; ++i) store(lines.partials[n] + 2 + channel + i * W, sums[n][i]);
}

template <int N, class Values>
void soften_and_weigh(const AttentionProblem& p, const Values& values, const Lines& lines, int count, bool all_visible,
                      float* scores) {
    float factors[N];
    soften<N>(p, lines, scores, factors);
    constexpr int V = vectors_beside(N);
    int channel = 0;
    for (; channel + V * W <= p.value_size; channel += V * W)
        weigh_channels<N, V>(values, scores, lines, channel, count, all_visible, factors);
    for (; channel < p.value_size; channel += W)
        weigh_channels<N, 1>(values, scores, lines, channel, count, all_visible, factors);
}

// The block of a few lines, as it is stored.
struct StoredBlock {
    const AttentionProblem& p;
    const KeyBlock &block, &ahead;
    static constexpr int kMostLines = kDirectLines;

    template <int N> void attend(const Lines& lines, bool all_visible, float* scores) const {
        switch (p.k_type) {
            case KvType::f16: score_stored<KvType::f16, N>(block, ahead, lines, p.key_size, scores); break;
            case KvType::q8_0: score_stored<KvType::q8_0, N>(block, ahead, lines, p.key_size, scores); break;
            case KvType::q4_0: score_stored<KvType::q4_0, N>(block, ahead, lines, p.key_size, scores); break;
            case KvType::f32: score_stored<KvType::f32, N>(block, ahead, lines, p.key_size, scores); break;
        }
        weigh<N>(lines, all_visible, scores);
    }
    template <int N> void weigh(const Lines& lines, bool all_visible, float* scores) const {
        switch (p.v_type) {
            case KvType::f16: return weigh_stored<KvType::f16, N>(lines, all_visible, scores);
            case KvType::q8_0: return weigh_stored<KvType::q8_0, N>(lines, all_visible, scores);
            case KvType::q4_0: return weigh_stored<KvType::q4_0, N>(lines, all_visible, scores);
            case KvType::f32: return weigh_stored<KvType::f32, N>(lines, all_visible, scores);
        }
    }
    template <KvType Type, int N> void weigh_stored(const Lines& lines, bool all_visible, float* scores) const {
        const StoredValues<Type> values{block, ahead, Rows<Type>::num_bytes(p.value_size)};
        soften_and_weigh<N>(p, values, lines, block.count, all_visible, scores);
    }
};

// The block of many lines: keys turned (key_size, kBlockKeys) and values (kBlockKeys, value_size) in floats.
struct ConvertedBlock {
    const AttentionProblem& p;
    const KeyBlock &block, &ahead;
    float *keys, *values;
    static constexpr int kMostLines = kTileLines;
    static constexpr bool kExact = true;

    template <KvType Type> void fill_keys() const {
        for (int j = 0; j < kBlockKeys; j += W)
            for (int d = 0; d < p.key_size; d += W) {
                if (d == 0)
                    for (int i = 0; i < W; ++i) prefetch(ahead.keys[j + i], Rows<Type>::num_bytes(p.key_size));
                Floats channels[W];
                for (int i = 0; i < W; ++i) channels[i] = Rows<Type>::load(block.keys[j + i], d);
                turn(channels);
                for (int c = 0; c < W; ++c) store(keys + (d + c) * kBlockKeys + j, channels[c]);
            }
    }
    template <KvType Type> void fill_values() const {
        for (int j = 0; j < block.count; ++j) {
            prefetch(ahead.values[j], Rows<Type>::num_bytes(p.value_size));
            for (int d = 0; d < p.value_size; d += W) store(values + j * p.value_size + d, Rows<Type>::load(block.values[j], d));
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
    template <int N> void attend(const Lines& lines, bool all_visible, float* scores) const {
        score_turned<N>(keys, lines, p.key_size, scores);
        weigh<N>(lines, all_visible, scores);
    }
    template <int N> void weigh(const Lines& lines, bool all_visible, float* scores) const {
        soften_and_weigh<N>(p, FloatValues{values, p.value_size}, lines, block.count, all_visible, scores);
    }
};

// A block of either kind with states in place of its keys.
template <class Block> struct StateBlock {
    const Block& block;
    const StatePage page;
    static constexpr int kMostLines = Block::kMostLines;
    template <int N> void attend(const Lines& lines, bool all_visible, float* scores) const {
        score_states<N>(page, block.p, lines, scores);
        block.template weigh<N>(lines, all_visible, scores);
    }
};

template <class Block> void attend_lines(const Block& block, const Lines& lines, bool all_visible, float* scores) {
    switch (lines.count) {
        case 1: return block.template attend<1>(lines, all_visible, scores);
        case 2: return block.template attend<2>(lines, all_visible, scores);
        case 3: return block.template attend<3>(lines, all_visible, scores);
        case 4: return block.template attend<4>(lines, all_visible, scores);
        case 5: return block.template attend<5>(lines, all_visible, scores);
        case 6: return block.template attend<6>(lines, all_visible, scores);
    }
    if constexpr (Block::kMostLines > 6) {
        if (lines.count == 7) return block.template attend<7>(lines, all_visible, scores);
        if (lines.count == 8) return block.template attend<8>(lines, all_visible, scores);
    }
}

// The rows of one call and the heads of its KV head, as lines.
struct RowGroup {
    const AttentionProblem& p;
    int kv_head, row_begin;
    float* partials;

    float* exported(int row, int head, int key) const {
        if (p.scores == nullptr || row < p.first_scored_row) return nullptr;
        return p.scores + (size_t(row - p.first_scored_row) * p.num_heads + head) * p.scores_stride + key;
    }
    void add(Lines& lines, int line, const float* bias, int key) const {
        const int row = row_begin + line / p.group_size(), head = kv_head * p.group_size() + line % p.group_size();
        lines.q[lines.count] = reinterpret_cast<const float*>(p.q + row * p.q_row_stride + head * p.q_head_stride);
        lines.bias[lines.count] = bias;
        lines.partials[lines.count] = partials + line * partial_floats(p);
        lines.exported[lines.count] = exported(row, head, key);
        ++lines.count;
    }
    // Rows that see the whole block share it; one that sees a part of it has it for itself.
    template <class Block>
    void attend(const Block& of_rows, const KeyBlock& block, const BlockMask* masks, int num_rows, float* scores) const {
        const auto sees_all = [&](int i) { return masks[i].num_visible == block.count; };
        for (int first = 0, end = 0; first < num_rows; first = end) {
            end = first + 1;
            if (masks[first].num_visible == 0) {
                hide(first, block.begin);
                continue;
            }
            while (sees_all(first) && end < num_rows && sees_all(end)) ++end;
            for (int line = first * p.group_size(); line < end * p.group_size();) {
                Lines lines;
                lines.count = 0;
                for (; line < end * p.group_size() && lines.count < Block::kMostLines; ++line)
                    add(lines, line, masks[line / p.group_size()].bias, block.begin);
                attend_lines(of_rows, lines, sees_all(first), scores);
            }
        }
    }
    // Rows for which the block lies behind their windows: all of it is seen.
    template <class Block> void attend_all(const Block& of_rows, int key, int first_row, int num_rows, float* scores) const {
        for (int line = first_row * p.group_size(), end = num_rows * p.group_size(); line < end;) {
            Lines lines;
            lines.count = 0;
            for (; line < end && lines.count < Block::kMostLines; ++line) add(lines, line, kNoBias, key);
            attend_lines(of_rows, lines, true, scores);
        }
    }
    void hide(int index, int key) const {
        for (int head = kv_head * p.group_size(); head < (kv_head + 1) * p.group_size(); ++head) {
            float* scores = exported(row_begin + index, head, key);
            for (int j = 0; scores != nullptr && j < kBlockKeys; ++j) scores[j] = kMinusInfinity;
        }
    }
};

// Of a call's rows, so many first ones do not have a page of keys behind their windows.
inline int num_dense_rows(const AttentionProblem& p, int row_begin, int num_rows, int page) {
    int num_dense = 0;
    while (num_dense < num_rows && (p.states == nullptr || p.states->num_pages(row_begin + num_dense) <= page)) ++num_dense;
    return num_dense;
}

template <class ManyLinesBlock>
void attend_blocks(const AttentionProblem& p, int kv_head, int row_begin, int row_end, int key_begin, int key_end, float* scratch,
                   float* partials) {
    float* keys = scratch;
    float* values = keys + kBlockKeys * kMaxHeadSize;
    float* bias = values + kBlockKeys * kMaxHeadSize;
    float* scores = bias + kTileRows * kBlockKeys;
    const int num_rows = row_end - row_begin;
    const bool few = ManyLinesBlock::kExact && num_rows * p.group_size() <= kDirectLines;
    const RowGroup rows{p, kv_head, row_begin, partials};
    KeyBlock block, ahead;
    for (int begin = key_begin; begin < key_end; begin += kBlockKeys) {
        locate(p, kv_head, begin, block);
        locate(p, kv_head, begin + kAhead < p.num_keys ? begin + kAhead : begin, ahead);
        const int num_dense = num_dense_rows(p, row_begin, num_rows, begin / kBlockKeys);
        if (num_dense < num_rows) {
            const StatePage page = page_of(p, kv_head, begin / kBlockKeys);
            const StoredBlock stored{p, block, ahead};
            const ConvertedBlock converted{p, block, ahead, keys, values};
            if (few) {
                rows.attend_all(StateBlock<StoredBlock>{stored, page}, begin, num_dense, num_rows, scores);
            } else {
                converted.fill_values();
                rows.attend_all(StateBlock<ConvertedBlock>{converted, page}, begin, num_dense, num_rows, scores);
            }
        }
        if (num_dense == 0) continue;
        BlockMask masks[kTileRows];
        bool seen = false;
        for (int i = 0; i < num_dense; ++i) {
            masks[i] = read_mask(p, row_begin + i, block, bias + i * kBlockKeys);
            seen |= masks[i].num_visible != 0;
        }
        if (few || !seen) {
            rows.attend(StoredBlock{p, block, ahead}, block, masks, num_dense, scores);
        } else {
            const ManyLinesBlock converted{p, block, ahead, keys, values};
            converted.fill();
            rows.attend(converted, block, masks, num_dense, scores);
        }
    }
}

}  // namespace

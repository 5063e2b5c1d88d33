// Random layers of a graph over several forward passes: what is appended and attended to, against the same in double.
// The thread group uses real threads, or runs one after another in any order: none may wait for another.

#include "onnx/attention_op.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "checks.h"
#include "random_threads.h"
#include "simd.h"
#include "sparse/delta/delta_blocks.h"
#include "sparse/delta/delta_rows.h"
#include "sparse/policy.h"

namespace {

constexpr int kF16 = int(KvType::f16), kF32 = int(KvType::f32);
constexpr double kPi = 3.14159265358979;

// An array of fp16 or float32 of exactly the needed size.
struct Array {
    int type = kF32;
    std::unique_ptr<float[]> floats;
    std::unique_ptr<uint16_t[]> halves;

    Array(int array_type, size_t size) : type(array_type) {
        if (type == kF32) floats.reset(new float[size]());
        else halves.reset(new uint16_t[size]());
    }
    char* data() { return type == kF32 ? reinterpret_cast<char*>(floats.get()) : reinterpret_cast<char*>(halves.get()); }
    double at(size_t i) const { return type == kF32 ? floats[i] : fp16_to_float(halves[i]); }
    void set(size_t i, float value) {
        if (type == kF32) floats[i] = value;
        else halves[i] = float_to_fp16(value);
    }
    size_t stride(int width) const { return size_t(width) * (type == kF32 ? 4 : 2); }
};

float random_float() { return float(pick(-2000, 2000)) / 1000; }

struct Layer {
    OnnxLayer rows{};
    int element;
    int width, kv_width;
    bool rounds_to_fp16 = false;  // a policy stores keys as fp16 beside the cache
    Array k_cache, v_cache;
    std::vector<float> cosines, sines;
    std::vector<std::vector<double>> keys, values;  // by slot

    Layer(int size, int kv_heads, int group, int num_slots, int cache_type)
        : element(pick(0, 1) ? kF16 : kF32), width(size * kv_heads * group), kv_width(size * kv_heads),
          k_cache(cache_type, size_t(num_slots) * kv_width), v_cache(cache_type, size_t(num_slots) * kv_width) {
        rows.head_dim = size, rows.num_kv_heads = kv_heads, rows.num_heads = kv_heads * group, rows.cache_type = cache_type;
        rows.k_cache = k_cache.data(), rows.v_cache = v_cache.data(), rows.num_slots = num_slots;
        rows.scale = 0.2f, rows.softcap = pick(0, 2) == 0 ? 5.0f : 0.0f;
        rows.interleaved = pick(0, 1), rows.is_packed = pick(0, 1);
        rows.is_causal = pick(0, 3) != 0, rows.window = rows.is_causal && pick(0, 2) == 0 ? pick(1, 50) : 0;
        if (pick(0, 3) == 0) return;
        rows.rotary_pairs = pick(1, size / 2);
        for (int i = 0; i < num_slots * rows.rotary_pairs; ++i) {
            const double angle = pick(0, 1000) / 1000.0 * 2 * kPi;
            cosines.push_back(float(std::cos(angle))), sines.push_back(float(std::sin(angle)));
        }
        rows.cosines = cosines.data(), rows.sines = sines.data();
    }

    bool sees(int position, int key) const {
        return !rows.is_causal || (key <= position && (rows.window == 0 || key > position - rows.window));
    }

    std::vector<double> rotated(std::vector<double> channels, int position) const {
        const int pairs = rows.rotary_pairs, size = rows.head_dim;
        for (size_t head = 0; head < channels.size(); head += size)
            for (int i = 0; i < pairs; ++i) {
                const int one = rows.interleaved ? 2 * i : i, other = rows.interleaved ? 2 * i + 1 : i + pairs;
                const double c = cosines[position * pairs + i], s = sines[position * pairs + i];
                const double a = channels[head + one], b = channels[head + other];
                channels[head + one] = a * c - b * s, channels[head + other] = b * c + a * s;
            }
        return channels;
    }

    // `bias` is added to a key's score; minus infinity masks the key.
    double reference(const std::vector<double>& query, int head, int channel, int position, const std::vector<double>& bias) const {
        const int size = rows.head_dim, kv = head / (rows.num_heads / rows.num_kv_heads) * size;
        double sum = 0, total = 0;
        for (size_t slot = 0; slot < keys.size(); ++slot) {
            if (!sees(position, int(slot))) continue;
            double score = 0;
            for (int d = 0; d < size; ++d) score += query[head * size + d] * keys[slot][kv + d];
            score *= rows.scale;
            if (rows.softcap != 0) score = rows.softcap * std::tanh(score / rows.softcap);
            const double weight = std::exp(score + bias[slot]);
            sum += weight * values[slot][kv + channel], total += weight;
        }
        return total == 0 ? 0 : sum / total;
    }
};

void fill(Array& array, size_t begin, size_t stride, int width, int num_rows) {
    for (int row = 0; row < num_rows; ++row)
        for (int i = 0; i < width; ++i) array.set(begin + row * stride + i, random_float());
}

// The inputs of a node: separate, or packed.
struct NodeInputs {
    Array packed, key, value, out;
    std::vector<float> bias;
    OnnxAttentionInputs node{};

    NodeInputs(const Layer& layer, int num_rows, int num_keys)
        : packed(layer.element, size_t(num_rows) * (layer.rows.is_packed ? layer.width + 2 * layer.kv_width : layer.width)),
          key(layer.element, size_t(num_rows) * layer.kv_width), value(layer.element, size_t(num_rows) * layer.kv_width),
          out(layer.element, size_t(num_rows) * layer.width) {
        const int all = layer.rows.is_packed ? layer.width + 2 * layer.kv_width : layer.width;
        fill(packed, 0, all, all, num_rows);
        fill(key, 0, layer.kv_width, layer.kv_width, num_rows), fill(value, 0, layer.kv_width, layer.kv_width, num_rows);
        node.query = packed.data(), node.out = out.data(), node.element = KvType(layer.element);
        if (!layer.rows.is_packed) node.key = key.data(), node.value = value.data();
        if (pick(0, 2) != 0) return;
        node.bias_tokens = pick(0, 1) ? 1 : num_rows, node.bias_keys = num_keys;
        for (int64_t i = 0; i < node.bias_tokens * num_keys; ++i) bias.push_back(pick(0, 3) == 0 ? -1e9f : random_float());
        node.bias = reinterpret_cast<const char*>(bias.data()), node.bias_element = OnnxAttentionInputs::kF32;
    }

    std::vector<double> bias_of(int row, int num_keys) const {
        std::vector<double> found(num_keys, 0.0);
        for (int i = 0; node.bias != nullptr && i < num_keys; ++i) {
            const float added = bias[(node.bias_tokens == 1 ? 0 : size_t(row) * num_keys) + i];
            found[i] = added <= -1e4f ? -INFINITY : fp16_to_float(float_to_fp16(added));
        }
        return found;
    }
};

std::vector<double> channels_of(const Array& array, size_t begin, int width) {
    std::vector<double> channels;
    for (int i = 0; i < width; ++i) channels.push_back(array.at(begin + i));
    return channels;
}

void check_pass(OnnxAttention* attention, Layer& layer, int num_past, int num_rows, ThreadGroup& threads) {
    const int num_keys = num_past + num_rows, width = layer.width, kv_width = layer.kv_width;
    NodeInputs rows(layer, num_rows, num_keys);
    lowtide_onnx_begin(attention, num_past, num_rows);
    const char* wrong = append_and_attend(*attention, 0, rows.node, threads);
    require(wrong == nullptr, "%d tokens with head_dim %d are refused: %s", num_rows, layer.rows.head_dim, wrong);
    const bool packed = layer.rows.is_packed;
    const size_t stride = packed ? width + 2 * kv_width : width;
    layer.keys.resize(num_past), layer.values.resize(num_past);
    for (int row = 0; row < num_rows; ++row) {
        const auto key =
            packed ? channels_of(rows.packed, row * stride + width, kv_width) : channels_of(rows.key, size_t(row) * kv_width, kv_width);
        const auto value = packed ? channels_of(rows.packed, row * stride + width + kv_width, kv_width)
                                  : channels_of(rows.value, size_t(row) * kv_width, kv_width);
        layer.keys.push_back(layer.rotated(key, num_past + row)), layer.values.push_back(value);
    }
    const bool has_halves = layer.element == kF16 || layer.rows.cache_type == kF16 || layer.rounds_to_fp16;
    const double allowed = has_halves ? 2e-2 : 1e-4;
    for (int row = 0; row < num_rows; ++row) {
        const std::vector<double> query = layer.rotated(channels_of(rows.packed, row * stride, width), num_past + row);
        const int head = pick(0, layer.rows.num_heads - 1), channel = pick(0, layer.rows.head_dim - 1);
        const double reference = layer.reference(query, head, channel, num_past + row, rows.bias_of(row, num_keys));
        const double found = rows.out.at(size_t(row) * width + head * layer.rows.head_dim + channel);
        require(std::fabs(found - reference) < allowed, "token %d of %d after %d: %g, expected %g", row, num_rows, num_past, found, reference);
    }
    rows.node.bias = reinterpret_cast<const char*>(rows.out.data()), rows.node.bias_keys = num_keys + 1;
    lowtide_onnx_begin(attention, num_past, num_rows);
    require(append_and_attend(*attention, 0, rows.node, threads) != nullptr, "a bias of another shape is accepted");
}

// A forward pass that ends with the layer: its keys are appended and scored by the last token, and the next pass is a
// whole one.
void check_end(OnnxAttention* attention, Layer& layer, int num_past, ThreadGroup& threads) {
    const int num_rows = pick(1, 20), num_keys = num_past + num_rows, width = layer.width, kv_width = layer.kv_width;
    NodeInputs rows(layer, num_rows, num_keys);
    lowtide_onnx_begin(attention, num_past, num_rows);
    require(append_and_attend(*attention, 0, rows.node, threads) == nullptr && !lowtide_onnx_has_ended(attention), "a whole pass ends");
    const std::vector<double> expected = channels_of(layer.k_cache, size_t(num_past) * kv_width, num_rows * kv_width);
    std::memset(layer.k_cache.data() + layer.k_cache.stride(num_past * kv_width), 0, layer.k_cache.stride(num_rows * kv_width));

    ScoreRule rule{1, 1, 0};
    lowtide_onnx_score_prompt(attention, 0, &rule, 1);
    lowtide_onnx_begin(attention, num_past, num_rows);
    require(append_and_attend(*attention, 0, rows.node, threads) != nullptr && lowtide_onnx_has_ended(attention), "a pass does not end");
    require(channels_of(layer.k_cache, size_t(num_past) * kv_width, num_rows * kv_width) == expected, "its slots have other data");

    const size_t stride = layer.rows.is_packed ? width + 2 * kv_width : width;
    const int last = num_rows - 1, size = layer.rows.head_dim;
    const std::vector<double> query = layer.rotated(channels_of(rows.packed, last * stride, width), num_past + last);
    const std::vector<double> bias = rows.bias_of(last, num_keys);
    std::vector<double> reference(num_keys, 0.0);
    for (int head = 0; head < layer.rows.num_heads; ++head) {
        const int kv = head / (layer.rows.num_heads / layer.rows.num_kv_heads) * size;
        std::vector<double> weights(num_keys, 0.0);
        double total = 0;
        for (int slot = 0; slot < num_keys; ++slot) {
            if (!layer.sees(num_past + last, slot)) continue;
            double score = 0;
            for (int d = 0; d < size; ++d) score += query[head * size + d] * layer.k_cache.at(size_t(slot) * kv_width + kv + d);
            score *= layer.rows.scale;
            if (layer.rows.softcap != 0) score = layer.rows.softcap * std::tanh(score / layer.rows.softcap);
            total += weights[slot] = std::exp(score + bias[slot]);
        }
        for (int slot = 0; slot < num_keys && total > 0; ++slot) reference[slot] += weights[slot] / total;
    }
    std::vector<float> found(num_keys);
    require(lowtide_onnx_prompt_scores(attention, found.data(), num_keys) == num_keys, "not every key is scored");
    for (int slot = 0; slot < num_keys; ++slot)
        require(std::fabs(found[slot] - reference[slot]) < 1e-3, "key %d scores %g, expected %g", slot, found[slot], reference[slot]);
    float none = 7;
    require(lowtide_onnx_prompt_scores(attention, &none, num_keys + 1) == num_keys && none == 7, "too many scores are written");

    lowtide_onnx_score_prompt(attention, 0, &rule, 0);
    lowtide_onnx_begin(attention, num_past, num_rows);
    require(append_and_attend(*attention, 0, rows.node, threads) != nullptr, "a pass before the last one does not end");
    require(lowtide_onnx_prompt_scores(attention, &none, 1) == 0, "an unfinished prompt is scored");
    lowtide_onnx_score_prompt(attention, -1, nullptr, 0);
    lowtide_onnx_begin(attention, num_past, num_rows);
    require(append_and_attend(*attention, 0, rows.node, threads) == nullptr && !lowtide_onnx_has_ended(attention),
            "passes are not whole again");
}

// Policies that approximate nothing: clusters with no page behind the window, merged blocks that are all stored, or
// dense.
void set_policy(OnnxAttention* attention, Layer& layer) {
    CurrentPolicy* policy = lowtide_onnx_policy(attention);
    const int kv_heads = layer.rows.num_kv_heads, size = layer.rows.head_dim, kind = pick(0, 2);
    layer.rounds_to_fp16 = kind != 0;
    const std::vector<float> scales(size_t(kv_heads) * size, 1.0f), nothing(kv_heads, 0.0f), all(kv_heads, 1.0f);
    if (kind == 1) {
        const DeltaRowsRule rule{layer.rows.num_slots, 4, 0.01f};
        const std::vector<uint8_t> num_groups(kv_heads, 32);
        require(lowtide_policy_set_delta_rows(policy, &rule, num_groups.data(), nothing.data(), scales.data(), 1, kv_heads, size) == 0,
                "clusters are refused");
        lowtide_policy_start_delta_rows(policy, pick(0, 1));
    } else if (kind == 2) {
        const DeltaBlocksRule rule{pick(1, 50), 4, pick(0, 1) ? 1 : 8, 0.01f};
        require(lowtide_policy_set_delta_blocks(policy, &rule, nothing.data(), all.data(), scales.data(), 1, kv_heads, size) == 0,
                "merged key blocks are refused");
        lowtide_policy_start_delta_blocks(policy, pick(0, 1));
    }
}

void check_layer() {
    const int num_threads = pick(1, 3);
    OnnxAttention* attention = lowtide_onnx_new(nullptr, num_threads);
    require(attention != nullptr, "there are no kernels");
    require(find_onnx_attention(lowtide_onnx_handle(attention)) == attention, "its handle finds another object");
    RandomThreadGroup threads(num_threads);
    Layer layer(16 * pick(1, 5), pick(1, 3), pick(1, 3), 400, pick(0, 1) ? kF16 : kF32);
    require(lowtide_onnx_set_layers(attention, &layer.rows, 1) == 0, "the layer is refused");
    set_policy(attention, layer);
    for (int num_tokens = 0, pass = 0; pass < 6; ++pass) {
        const int num_rows = pick(0, 1) ? 1 : pick(1, 60);
        check_pass(attention, layer, num_tokens, num_rows, threads);
        num_tokens += num_rows;
        if (pick(0, 3) == 0) num_tokens = pick(0, num_tokens);  // truncate
    }
    check_end(attention, layer, pick(0, int(layer.keys.size())), threads);
    const NodeInputs none(layer, 1, 1);
    lowtide_onnx_begin(attention, 400, 1);
    require(append_and_attend(*attention, 0, none.node, threads) != nullptr, "a token is stored behind the last slot");
    layer.rows.head_dim = 24;
    require(lowtide_onnx_set_layers(attention, &layer.rows, 1) == 2, "a head_dim of 24 is accepted");
    const int64_t handle = lowtide_onnx_handle(attention);
    lowtide_onnx_free(attention);
    require(find_onnx_attention(handle) == nullptr, "a handle is found after its attention is gone");
}

}  // namespace

int main() {
    int num_checked = 0;
    for (; num_checked < 40; ++num_checked) check_layer();
    std::printf("%d layers agree\n", num_checked);
    return 0;
}

// Random layers of a graph, pass after pass: what is appended and attended to, against the same in double precision.
// The work of a team's threads is done by real threads, or by one after another in any order: none may wait for another.

#include "onnx_attend.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "checks.h"
#include "half.h"
#include "policy_attend.h"
#include "some_team.h"

namespace {

constexpr int kF16 = int(KvType::f16), kF32 = int(KvType::f32);
constexpr double kPi = 3.14159265358979;

// An array of halves or floats, of exactly its size.
struct Array {
    int type = kF32;
    std::unique_ptr<float[]> floats;
    std::unique_ptr<uint16_t[]> halves;

    Array(int type, size_t size) : type(type) {
        if (type == kF32) floats.reset(new float[size]());
        else halves.reset(new uint16_t[size]());
    }
    char* data() { return type == kF32 ? reinterpret_cast<char*>(floats.get()) : reinterpret_cast<char*>(halves.get()); }
    double at(size_t i) const { return type == kF32 ? floats[i] : half_to_float(halves[i]); }
    void set(size_t i, float value) {
        if (type == kF32) floats[i] = value;
        else halves[i] = float_to_half(value);
    }
    size_t stride(int width) const { return size_t(width) * (type == kF32 ? 4 : 2); }
};

float some_float() { return float(pick(-2000, 2000)) / 1000; }

struct Layer {
    OnnxLayer rows{};
    int element;
    int width, kv_width;
    bool keeps_halves = false;  // beside its cache
    Array k_cache, v_cache;
    std::vector<float> cosines, sines;
    std::vector<std::vector<double>> keys, values;  // by cell

    Layer(int size, int kv_heads, int group, int num_cells, int cache_type)
        : element(pick(0, 1) ? kF16 : kF32), width(size * kv_heads * group), kv_width(size * kv_heads),
          k_cache(cache_type, size_t(num_cells) * kv_width), v_cache(cache_type, size_t(num_cells) * kv_width) {
        rows.head_size = size, rows.num_kv_heads = kv_heads, rows.num_heads = kv_heads * group, rows.cache_type = cache_type;
        rows.k_cache = k_cache.data(), rows.v_cache = v_cache.data(), rows.num_cells = num_cells;
        rows.scale = 0.2f, rows.softcap = pick(0, 2) == 0 ? 5.0f : 0.0f;
        rows.interleaved = pick(0, 1), rows.is_packed = pick(0, 1);
        rows.is_causal = pick(0, 3) != 0, rows.window = rows.is_causal && pick(0, 2) == 0 ? pick(1, 50) : 0;
        if (pick(0, 3) == 0) return;
        rows.rotary_pairs = pick(1, size / 2);
        for (int i = 0; i < num_cells * rows.rotary_pairs; ++i) {
            const double angle = pick(0, 1000) / 1000.0 * 2 * kPi;
            cosines.push_back(float(std::cos(angle))), sines.push_back(float(std::sin(angle)));
        }
        rows.cosines = cosines.data(), rows.sines = sines.data();
    }

    bool sees(int position, int key) const {
        return !rows.is_causal || (key <= position && (rows.window == 0 || key > position - rows.window));
    }

    std::vector<double> turned(std::vector<double> channels, int position) const {
        const int pairs = rows.rotary_pairs, size = rows.head_size;
        for (size_t head = 0; head < channels.size(); head += size)
            for (int i = 0; i < pairs; ++i) {
                const int one = rows.interleaved ? 2 * i : i, other = rows.interleaved ? 2 * i + 1 : i + pairs;
                const double c = cosines[position * pairs + i], s = sines[position * pairs + i];
                const double a = channels[head + one], b = channels[head + other];
                channels[head + one] = a * c - b * s, channels[head + other] = b * c + a * s;
            }
        return channels;
    }

    // `bias` is added to a key's score; nothing is seen through minus infinity.
    double wanted(const std::vector<double>& query, int head, int channel, int position, const std::vector<double>& bias) const {
        const int size = rows.head_size, kv = head / (rows.num_heads / rows.num_kv_heads) * size;
        double sum = 0, total = 0;
        for (size_t cell = 0; cell < keys.size(); ++cell) {
            if (!sees(position, int(cell))) continue;
            double score = 0;
            for (int d = 0; d < size; ++d) score += query[head * size + d] * keys[cell][kv + d];
            score *= rows.scale;
            if (rows.softcap != 0) score = rows.softcap * std::tanh(score / rows.softcap);
            const double weight = std::exp(score + bias[cell]);
            sum += weight * values[cell][kv + channel], total += weight;
        }
        return total == 0 ? 0 : sum / total;
    }
};

void fill(Array& array, size_t begin, size_t stride, int width, int num_rows) {
    for (int row = 0; row < num_rows; ++row)
        for (int i = 0; i < width; ++i) array.set(begin + row * stride + i, some_float());
}

// Rows of a pass as a graph has them: apart, or packed.
struct Rows {
    Array packed, key, value, out;
    std::vector<float> bias;
    OnnxRows given{};

    Rows(const Layer& layer, int num_rows, int num_keys)
        : packed(layer.element, size_t(num_rows) * (layer.rows.is_packed ? layer.width + 2 * layer.kv_width : layer.width)),
          key(layer.element, size_t(num_rows) * layer.kv_width), value(layer.element, size_t(num_rows) * layer.kv_width),
          out(layer.element, size_t(num_rows) * layer.width) {
        const int all = layer.rows.is_packed ? layer.width + 2 * layer.kv_width : layer.width;
        fill(packed, 0, all, all, num_rows);
        fill(key, 0, layer.kv_width, layer.kv_width, num_rows), fill(value, 0, layer.kv_width, layer.kv_width, num_rows);
        given.query = packed.data(), given.out = out.data(), given.element = KvType(layer.element);
        if (!layer.rows.is_packed) given.key = key.data(), given.value = value.data();
        if (pick(0, 2) != 0) return;
        given.bias_rows = pick(0, 1) ? 1 : num_rows, given.bias_keys = num_keys;
        for (int64_t i = 0; i < given.bias_rows * num_keys; ++i) bias.push_back(pick(0, 3) == 0 ? -1e9f : some_float());
        given.bias = reinterpret_cast<const char*>(bias.data()), given.bias_element = OnnxRows::kF32;
    }

    std::vector<double> bias_of(int row, int num_keys) const {
        std::vector<double> found(num_keys, 0.0);
        for (int key = 0; given.bias != nullptr && key < num_keys; ++key) {
            const float value = bias[(given.bias_rows == 1 ? 0 : size_t(row) * num_keys) + key];
            found[key] = value <= -1e4f ? -INFINITY : half_to_float(float_to_half(value));
        }
        return found;
    }
};

std::vector<double> channels_of(const Array& array, size_t begin, int width) {
    std::vector<double> channels;
    for (int i = 0; i < width; ++i) channels.push_back(array.at(begin + i));
    return channels;
}

void check_pass(OnnxAttend* attend, Layer& layer, int num_past, int num_rows, Team& team) {
    const int num_keys = num_past + num_rows, width = layer.width, kv_width = layer.kv_width;
    Rows rows(layer, num_rows, num_keys);
    lowtide_onnx_begin(attend, num_past, num_rows);
    const char* wrong = attend_rows(*attend, 0, rows.given, team);
    require(wrong == nullptr, "%d rows of size %d are refused: %s", num_rows, layer.rows.head_size, wrong);
    const bool packed = layer.rows.is_packed;
    const size_t stride = packed ? width + 2 * kv_width : width;
    layer.keys.resize(num_past), layer.values.resize(num_past);
    for (int row = 0; row < num_rows; ++row) {
        const auto key = packed ? channels_of(rows.packed, row * stride + width, kv_width) : channels_of(rows.key, size_t(row) * kv_width, kv_width);
        const auto value = packed ? channels_of(rows.packed, row * stride + width + kv_width, kv_width)
                                  : channels_of(rows.value, size_t(row) * kv_width, kv_width);
        layer.keys.push_back(layer.turned(key, num_past + row)), layer.values.push_back(value);
    }
    const bool has_halves = layer.element == kF16 || layer.rows.cache_type == kF16 || layer.keeps_halves;
    const double allowed = has_halves ? 2e-2 : 1e-4;
    for (int row = 0; row < num_rows; ++row) {
        const std::vector<double> query = layer.turned(channels_of(rows.packed, row * stride, width), num_past + row);
        const int head = pick(0, layer.rows.num_heads - 1), channel = pick(0, layer.rows.head_size - 1);
        const double wanted = layer.wanted(query, head, channel, num_past + row, rows.bias_of(row, num_keys));
        const double found = rows.out.at(size_t(row) * width + head * layer.rows.head_size + channel);
        require(std::fabs(found - wanted) < allowed, "row %d of %d after %d: %g, %g is wanted", row, num_rows, num_past, found, wanted);
    }
    rows.given.bias = reinterpret_cast<const char*>(rows.out.data()), rows.given.bias_keys = num_keys + 1;
    lowtide_onnx_begin(attend, num_past, num_rows);
    require(attend_rows(*attend, 0, rows.given, team) != nullptr, "a bias of another shape is taken");
}

// A pass that ends with the layer: its cells are there, its keys are scored by the last row, and the next is whole.
void check_end(OnnxAttend* attend, Layer& layer, int num_past, Team& team) {
    const int num_rows = pick(1, 20), num_keys = num_past + num_rows, width = layer.width, kv_width = layer.kv_width;
    Rows rows(layer, num_rows, num_keys);
    lowtide_onnx_begin(attend, num_past, num_rows);
    require(attend_rows(*attend, 0, rows.given, team) == nullptr && !lowtide_onnx_has_ended(attend), "a whole pass ends");
    const std::vector<double> expected = channels_of(layer.k_cache, size_t(num_past) * kv_width, num_rows * kv_width);
    std::memset(layer.k_cache.data() + layer.k_cache.stride(num_past * kv_width), 0, layer.k_cache.stride(num_rows * kv_width));

    ScoreRule rule{1, 1, 0};
    lowtide_onnx_score_prompt(attend, 0, &rule, 1);
    lowtide_onnx_begin(attend, num_past, num_rows);
    require(attend_rows(*attend, 0, rows.given, team) != nullptr && lowtide_onnx_has_ended(attend), "a pass does not end");
    require(channels_of(layer.k_cache, size_t(num_past) * kv_width, num_rows * kv_width) == expected, "its cells are others");

    const size_t stride = layer.rows.is_packed ? width + 2 * kv_width : width;
    const int last = num_rows - 1, size = layer.rows.head_size;
    const std::vector<double> query = layer.turned(channels_of(rows.packed, last * stride, width), num_past + last);
    const std::vector<double> bias = rows.bias_of(last, num_keys);
    std::vector<double> wanted(num_keys, 0.0);
    for (int head = 0; head < layer.rows.num_heads; ++head) {
        const int kv = head / (layer.rows.num_heads / layer.rows.num_kv_heads) * size;
        std::vector<double> weights(num_keys, 0.0);
        double total = 0;
        for (int cell = 0; cell < num_keys; ++cell) {
            if (!layer.sees(num_past + last, cell)) continue;
            double score = 0;
            for (int d = 0; d < size; ++d) score += query[head * size + d] * layer.k_cache.at(size_t(cell) * kv_width + kv + d);
            score *= layer.rows.scale;
            if (layer.rows.softcap != 0) score = layer.rows.softcap * std::tanh(score / layer.rows.softcap);
            total += weights[cell] = std::exp(score + bias[cell]);
        }
        for (int cell = 0; cell < num_keys && total > 0; ++cell) wanted[cell] += weights[cell] / total;
    }
    std::vector<float> found(num_keys);
    require(lowtide_onnx_prompt_scores(attend, found.data(), num_keys) == num_keys, "not every key is scored");
    for (int cell = 0; cell < num_keys; ++cell)
        require(std::fabs(found[cell] - wanted[cell]) < 1e-3, "key %d scores %g, %g is wanted", cell, found[cell], wanted[cell]);
    float none = 7;
    require(lowtide_onnx_prompt_scores(attend, &none, num_keys + 1) == num_keys && none == 7, "too many scores are written");

    lowtide_onnx_score_prompt(attend, 0, &rule, 0);
    lowtide_onnx_begin(attend, num_past, num_rows);
    require(attend_rows(*attend, 0, rows.given, team) != nullptr, "a pass before the last one does not end");
    require(lowtide_onnx_prompt_scores(attend, &none, 1) == 0, "a prompt that goes on is scored");
    lowtide_onnx_score_prompt(attend, -1, nullptr, 0);
    lowtide_onnx_begin(attend, num_past, num_rows);
    require(attend_rows(*attend, 0, rows.given, team) == nullptr && !lowtide_onnx_has_ended(attend), "passes are not whole again");
}

// Everything is seen as it is: as rows in front of which there is no group, as states that are sent whole, or in the cache.
void set_policy(OnnxAttend* attend, Layer& layer) {
    PolicyAttend* policy = lowtide_onnx_policy(attend);
    const int kv_heads = layer.rows.num_kv_heads, size = layer.rows.head_size, kind = pick(0, 2);
    layer.keeps_halves = kind != 0;
    const std::vector<float> scales(size_t(kv_heads) * size, 1.0f), nothing(kv_heads, 0.0f), all(kv_heads, 1.0f);
    if (kind == 1) {
        const DeltaRule rule{layer.rows.num_cells, 4, 0.01f, 0};
        const std::vector<uint8_t> num_groups(kv_heads, 32);
        require(lowtide_policy_set_groups(policy, &rule, num_groups.data(), nothing.data(), scales.data(), 1, kv_heads, size) == 0,
                "groups are refused");
        lowtide_policy_start_grouped(policy, pick(0, 1));
    } else if (kind == 2) {
        const StatesRule rule{pick(1, 50), 4, pick(0, 1) ? 1 : 8, 0.01f};
        require(lowtide_policy_set_states(policy, &rule, nothing.data(), all.data(), scales.data(), 1, kv_heads, size) == 0, "states are refused");
        lowtide_policy_start_states(policy, pick(0, 1));
    }
}

void check_layer() {
    const int num_threads = pick(1, 3);
    OnnxAttend* attend = lowtide_onnx_new(nullptr, num_threads);
    require(attend != nullptr, "there are no kernels");
    require(onnx_attend_of(lowtide_onnx_number(attend)) == attend, "its number is another's");
    SomeTeam team(num_threads);
    Layer layer(16 * pick(1, 5), pick(1, 3), pick(1, 3), 400, pick(0, 1) ? kF16 : kF32);
    require(lowtide_onnx_set_layers(attend, &layer.rows, 1) == 0, "the layer is refused");
    set_policy(attend, layer);
    for (int num_tokens = 0, pass = 0; pass < 6; ++pass) {
        const int num_rows = pick(0, 1) ? 1 : pick(1, 60);
        check_pass(attend, layer, num_tokens, num_rows, team);
        num_tokens += num_rows;
        if (pick(0, 3) == 0) num_tokens = pick(0, num_tokens);  // going back
    }
    check_end(attend, layer, pick(0, int(layer.keys.size())), team);
    const Rows none(layer, 1, 1);
    lowtide_onnx_begin(attend, 400, 1);
    require(attend_rows(*attend, 0, none.given, team) != nullptr, "a row is put behind the last cell");
    layer.rows.head_size = 24;
    require(lowtide_onnx_set_layers(attend, &layer.rows, 1) == 2, "a head of 24 is no shape of the kernels");
    const int64_t number = lowtide_onnx_number(attend);
    lowtide_onnx_free(attend);
    require(onnx_attend_of(number) == nullptr, "a number is known when its attention is gone");
}

}  // namespace

int main() {
    int num_checked = 0;
    for (; num_checked < 40; ++num_checked) check_layer();
    std::printf("%d layers agree\n", num_checked);
    return 0;
}

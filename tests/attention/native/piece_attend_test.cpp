// Random layers between the pieces of a graph, pass after pass, on several threads: what is appended and attended
// to, against the same in double precision. And a crew of threads, which does all of its work each time.

#include "piece_attend.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "checks.h"
#include "crew.h"
#include "half.h"

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
    PieceRows rows{};
    int width, kv_width, num_cells;
    Array k_cache, v_cache;
    std::vector<float> cosines, sines;
    std::vector<std::vector<double>> keys, values;  // by cell

    Layer(int size, int kv_heads, int group, int num_cells, int cache_type)
        : width(size * kv_heads * group), kv_width(size * kv_heads), num_cells(num_cells), k_cache(cache_type, size_t(num_cells) * kv_width),
          v_cache(cache_type, size_t(num_cells) * kv_width) {
        rows.head_size = size, rows.num_kv_heads = kv_heads, rows.num_heads = kv_heads * group, rows.cache_type = cache_type;
        rows.k_cache = k_cache.data(), rows.v_cache = v_cache.data();
        rows.scale = 0.2f, rows.softcap = pick(0, 2) == 0 ? 5.0f : 0.0f;
        rows.element = pick(0, 1) ? kF16 : kF32, rows.interleaved = pick(0, 1);
        if (pick(0, 3) == 0) return;
        rows.rotary_pairs = pick(1, size / 2);
        for (int i = 0; i < num_cells * rows.rotary_pairs; ++i) {
            const double angle = pick(0, 1000) / 1000.0 * 2 * kPi;
            cosines.push_back(float(std::cos(angle))), sines.push_back(float(std::sin(angle)));
        }
        rows.cosines = cosines.data(), rows.sines = sines.data();
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

    double wanted(const std::vector<double>& query, int head, int channel, int num_seen) const {
        const int size = rows.head_size, kv = head / (rows.num_heads / rows.num_kv_heads) * size;
        double sum = 0, total = 0;
        for (int cell = 0; cell < num_seen; ++cell) {
            double score = 0;
            for (int d = 0; d < size; ++d) score += query[head * size + d] * keys[cell][kv + d];
            score *= rows.scale;
            if (rows.softcap != 0) score = rows.softcap * std::tanh(score / rows.softcap);
            const double weight = std::exp(score);
            sum += weight * values[cell][kv + channel], total += weight;
        }
        return sum / total;
    }
};

std::vector<double> row_of(const Array& array, int row, int width) {
    std::vector<double> channels;
    for (int i = 0; i < width; ++i) channels.push_back(array.at(size_t(row) * width + i));
    return channels;
}

void fill(Array& array, size_t size) {
    for (size_t i = 0; i < size; ++i) array.set(i, some_float());
}

void check_pass(PieceAttend* pieces, Layer& layer, int num_past, int num_rows) {
    const int num_keys = num_past + num_rows;
    Array q(layer.rows.element, size_t(num_rows) * layer.width), out(layer.rows.element, size_t(num_rows) * layer.width);
    Array k(layer.rows.element, size_t(num_rows) * layer.kv_width), v(layer.rows.element, size_t(num_rows) * layer.kv_width);
    fill(q, size_t(num_rows) * layer.width), fill(k, size_t(num_rows) * layer.kv_width), fill(v, size_t(num_rows) * layer.kv_width);
    std::unique_ptr<uint16_t[]> mask(new uint16_t[size_t(num_rows) * num_keys]());
    for (int row = 0; row < num_rows; ++row)
        for (int key = num_past + row + 1; key < num_keys; ++key) mask[size_t(row) * num_keys + key] = kHiddenKey;
    PieceRows& rows = layer.rows;
    rows.q = q.data(), rows.k = k.data(), rows.v = v.data(), rows.out = out.data();
    rows.q_row_stride = rows.out_row_stride = q.stride(layer.width), rows.k_row_stride = rows.v_row_stride = k.stride(layer.kv_width);
    rows.mask = reinterpret_cast<char*>(mask.get()), rows.mask_row_stride = 2 * size_t(num_keys);
    rows.num_past = num_past, rows.num_rows = num_rows;
    require(lowtide_pieces_attend(pieces, &rows) == 0, "%d rows of size %d are refused", num_rows, rows.head_size);
    layer.keys.resize(num_past), layer.values.resize(num_past);
    for (int row = 0; row < num_rows; ++row) {
        layer.keys.push_back(layer.turned(row_of(k, row, layer.kv_width), num_past + row));
        layer.values.push_back(row_of(v, row, layer.kv_width));
    }
    const double allowed = rows.element == kF16 || rows.cache_type == kF16 ? 2e-2 : 1e-4;
    for (int row = 0; row < num_rows; ++row) {
        const std::vector<double> query = layer.turned(row_of(q, row, layer.width), num_past + row);
        const int head = pick(0, rows.num_heads - 1), channel = pick(0, rows.head_size - 1);
        const double wanted = layer.wanted(query, head, channel, num_past + row + 1);
        const double found = out.at(size_t(row) * layer.width + head * rows.head_size + channel);
        require(std::fabs(found - wanted) < allowed, "row %d of %d after %d: %g, %g is wanted", row, num_rows, num_past, found, wanted);
    }
}

void check_layer() {
    PieceAttend* pieces = lowtide_pieces_new(nullptr, pick(1, 3));
    require(pieces != nullptr, "there are no kernels");
    Layer layer(16 * pick(1, 5), pick(1, 3), pick(1, 3), 400, pick(0, 1) ? kF16 : kF32);
    for (int num_tokens = 0, pass = 0; pass < 6; ++pass) {
        const int num_rows = pick(0, 1) ? 1 : pick(1, 60);
        check_pass(pieces, layer, num_tokens, num_rows);
        num_tokens += num_rows;
        if (pick(0, 3) == 0) num_tokens = pick(0, num_tokens);  // going back
    }
    layer.rows.head_size = 24;
    require(lowtide_pieces_attend(pieces, &layer.rows) == 2, "a head of 24 is no shape of the kernels");
    lowtide_pieces_free(pieces);
}

void check_crew() {
    Crew crew(pick(1, 4));
    std::atomic<int> done{0};
    for (int round = 1; round <= 50; ++round) {
        crew.run([&](int thread) { done += 1 + thread; });
        const int each = crew.num_threads() * (crew.num_threads() + 1) / 2;
        require(done == round * each, "a round of %d threads left %d done", crew.num_threads(), done.load());
    }
}

}  // namespace

int main() {
    int num_checked = 0;
    for (; num_checked < 40; ++num_checked) check_layer(), check_crew();
    std::printf("%d layers agree\n", num_checked);
    return 0;
}

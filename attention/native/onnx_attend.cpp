#include "onnx_attend.h"

#include <chrono>
#include <cstring>
#include <new>
#include <vector>

#include "half.h"
#include "numbered.h"
#include "onnx_masks.h"
#include "policy_attend.h"
#include "prompt_scores.h"

namespace {

// Below so many products a second thread comes later than one is done.
constexpr size_t kProductsWorthAThread = 30000;

size_t element_bytes(KvType type) { return type == KvType::f32 ? 4 : 2; }

void read_floats(const char* from, KvType element, int count, float* to) {
    if (element == KvType::f32) {
        std::memcpy(to, from, sizeof(float) * count);
        return;
    }
    const auto* halves = reinterpret_cast<const uint16_t*>(from);
    for (int i = 0; i < count; ++i) to[i] = half_to_float(halves[i]);
}

void write_floats(const float* from, KvType element, int count, char* to) {
    if (element == KvType::f32) {
        std::memcpy(to, from, sizeof(float) * count);
        return;
    }
    auto* halves = reinterpret_cast<uint16_t*>(to);
    for (int i = 0; i < count; ++i) halves[i] = float_to_half(from[i]);
}

// RoFormer's rotary embedding (Su et al., arXiv 2104.09864), with cosines and sines as the graph has them.
void turn_heads(const OnnxLayer& layer, int position, int num_heads, float* heads) {
    if (layer.cosines == nullptr) return;
    const int pairs = layer.rotary_pairs, step = layer.interleaved ? 2 : 1, apart = layer.interleaved ? 1 : pairs;
    const float* cosines = layer.cosines + size_t(position) * pairs;
    const float* sines = layer.sines + size_t(position) * pairs;
    for (float* head = heads; head < heads + num_heads * layer.head_size; head += layer.head_size)
        for (int i = 0; i < pairs; ++i) {
            float &one = head[i * step], &other = head[i * step + apart];
            const float turned = one * cosines[i] - other * sines[i];
            other = one * sines[i] + other * cosines[i];
            one = turned;
        }
}

bool known_shape(const OnnxLayer& p, int num_layers) {
    const bool sized = p.head_size > 0 && p.head_size <= kMaxHeadSize && p.head_size % 16 == 0;
    const bool kept = KvType(p.cache_type) == KvType::f32 || KvType(p.cache_type) == KvType::f16;
    return sized && kept && p.num_cells > 0 && p.num_kv_heads > 0 && p.num_heads > 0 && p.num_heads % p.num_kv_heads == 0 &&
           p.rotary_pairs >= 0 && 2 * p.rotary_pairs <= p.head_size && p.mask >= 0 && p.mask < num_layers;
}

}  // namespace

class OnnxAttend : public Numbered<OnnxAttend> {
public:
    OnnxAttend(const KernelSet& kernels, int num_threads) : kernels(kernels), num_threads(num_threads) {}

    const KernelSet& kernels;
    const int num_threads;
    std::vector<OnnxLayer> layers;
    OnnxMasks masks;
    PolicyAttend attend;
    PromptScores prompt_scores;
    OnnxCounts counts{};
    bool has_ended = false;

    const char* run(int index, const OnnxRows& rows, Team& team) {
        const auto start = std::chrono::steady_clock::now();
        const OnnxLayer& layer = layers[index];
        if (masks.num_keys() > layer.num_cells) return "the cache has no such cells";
        make_room(layer, rows);
        const uint16_t* mask = masks.of(layer, rows);
        if (mask == nullptr) return "its bias is not of all rows and keys";
        AttentionProblem problem = problem_of(layer, rows);
        problem.mask = reinterpret_cast<const char*>(mask), problem.mask_row_stride = sizeof(uint16_t) * masks.num_keys();
        const bool ends = prompt_scores.end_with(index);
        if (!(ends ? prompt_scores.reserve(problem, team.num_threads) : attend.reserve(problem, index, 0, team.num_threads)))
            return "there is no memory for it";
        team.all([&](int thread) { append(layer, rows, thread, team.num_threads); }, [] {});
        if (ends) {
            prompt_scores.run(problem, kernels, team);
            has_ended = true;
            return "the pass ends here, as it was asked to";
        }
        const int num_read = attend.run(problem, index, 0, kernels, team);
        team.all([&](int thread) { give_out(layer, rows, thread, team.num_threads); }, [] {});
        counts.keys_read += num_read, counts.keys_held += problem.num_keys, ++counts.nodes;
        counts.nanoseconds += (std::chrono::steady_clock::now() - start).count();
        return nullptr;
    }

    bool pays_threads(const OnnxLayer& layer) const {
        const size_t products = size_t(masks.num_rows()) * layer.num_heads * masks.num_keys() * layer.head_size;
        return products >= kProductsWorthAThread;
    }

    size_t scratch_bytes() const {
        return attend.scratch_bytes() + prompt_scores.scratch_bytes() + sizeof(float) * (queries_.size() + keys_.size() + out_.size()) + masks.num_bytes();
    }

private:
    void make_room(const OnnxLayer& layer, const OnnxRows& rows) {
        const size_t size = size_t(masks.num_rows()) * layer.num_heads * layer.head_size;
        const size_t kv_width = size_t(layer.num_kv_heads) * layer.head_size;
        if (queries_.size() < size) queries_.resize(size);
        if (rows.element != KvType::f32 && out_.size() < size) out_.resize(size);
        if (keys_.size() < kv_width * num_threads) keys_.resize(kv_width * num_threads);
    }

    void append(const OnnxLayer& layer, const OnnxRows& rows, int thread, int num_threads) {
        const int width = layer.num_heads * layer.head_size, kv_width = layer.num_kv_heads * layer.head_size;
        const auto cache_type = KvType(layer.cache_type);
        const size_t element = element_bytes(rows.element), all = width + 2 * size_t(kv_width);
        const size_t q_stride = element * (layer.is_packed ? all : width), kv_stride = element * (layer.is_packed ? all : kv_width);
        const char* key = layer.is_packed ? rows.query + element * width : rows.key;
        const char* value = layer.is_packed ? key + element * kv_width : rows.value;
        float* turned = keys_.data() + size_t(thread) * kv_width;
        for (int row = thread; row < masks.num_rows(); row += num_threads) {
            const int position = masks.num_past() + row;
            float* query = queries_.data() + size_t(row) * width;
            read_floats(rows.query + row * q_stride, rows.element, width, query);
            turn_heads(layer, position, layer.num_heads, query);
            const size_t cell = size_t(position) * kv_width * element_bytes(cache_type);
            read_floats(key + row * kv_stride, rows.element, kv_width, turned);
            turn_heads(layer, position, layer.num_kv_heads, turned);
            write_floats(turned, cache_type, kv_width, layer.k_cache + cell);
            read_floats(value + row * kv_stride, rows.element, kv_width, turned);
            write_floats(turned, cache_type, kv_width, layer.v_cache + cell);
        }
    }

    AttentionProblem problem_of(const OnnxLayer& layer, const OnnxRows& rows) {
        const size_t head = layer.head_size * sizeof(float), width = layer.num_heads * head;
        const size_t kv_head = layer.head_size * element_bytes(KvType(layer.cache_type)), cell = layer.num_kv_heads * kv_head;
        AttentionProblem p{};
        p.q = reinterpret_cast<const char*>(queries_.data()), p.q_row_stride = width, p.q_head_stride = head;
        p.k = layer.k_cache, p.k_key_stride = cell, p.k_head_stride = kv_head;
        p.v = layer.v_cache, p.v_key_stride = cell, p.v_head_stride = kv_head;
        p.out = rows.element == KvType::f32 ? rows.out : reinterpret_cast<char*>(out_.data());
        p.out_row_stride = width, p.out_head_stride = head;
        p.k_type = p.v_type = KvType(layer.cache_type);
        p.num_rows = masks.num_rows(), p.num_keys = masks.num_keys();
        p.num_heads = layer.num_heads, p.num_kv_heads = layer.num_kv_heads, p.key_size = p.value_size = layer.head_size;
        p.scale = layer.scale, p.softcap = layer.softcap, p.rounded = attend.rounded;
        return p;
    }

    void give_out(const OnnxLayer& layer, const OnnxRows& rows, int thread, int num_threads) {
        if (rows.element == KvType::f32) return;
        const int width = layer.num_heads * layer.head_size;
        for (int row = thread; row < masks.num_rows(); row += num_threads)
            write_floats(out_.data() + size_t(row) * width, rows.element, width, rows.out + row * element_bytes(rows.element) * width);
    }

    std::vector<float> queries_, keys_, out_;
};

OnnxAttend* onnx_attend_of(int64_t number) { return OnnxAttend::find(number); }

int num_rows_of(const OnnxAttend& attend) { return attend.masks.num_rows(); }

const OnnxLayer* layer_of(const OnnxAttend& attend, int64_t layer) {
    return layer >= 0 && layer < int64_t(attend.layers.size()) ? &attend.layers[layer] : nullptr;
}

int threads_that_pay(const OnnxAttend& attend, const OnnxLayer& layer) { return attend.pays_threads(layer) ? attend.num_threads : 1; }

const char* attend_rows(OnnxAttend& attend, int64_t layer, const OnnxRows& rows, Team& team) {
    try {
        return attend.run(int(layer), rows, team);
    } catch (const std::bad_alloc&) {
        return "there is no memory for it";
    }
}

extern "C" OnnxAttend* lowtide_onnx_new(const char* kernels, int num_threads) {
    const KernelSet* found = find_kernels(kernels);
    if (found == nullptr || num_threads < 1) return nullptr;
    try {
        return new OnnxAttend(*found, num_threads);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

extern "C" void lowtide_onnx_free(OnnxAttend* attend) { delete attend; }

extern "C" int lowtide_onnx_can_round(const OnnxAttend* attend) { return attend->kernels.attend_rounded != nullptr; }

extern "C" const char* lowtide_onnx_kernels(const OnnxAttend* attend) { return attend->kernels.name; }

extern "C" PolicyAttend* lowtide_onnx_policy(OnnxAttend* attend) { return &attend->attend; }

extern "C" int64_t lowtide_onnx_number(const OnnxAttend* attend) { return attend->number; }

extern "C" int lowtide_onnx_set_layers(OnnxAttend* attend, const OnnxLayer* layers, int num_layers) {
    for (int i = 0; i < num_layers; ++i)
        if (!known_shape(layers[i], num_layers)) return 2;
    try {
        attend->layers.assign(layers, layers + num_layers);
        attend->attend.cut(0);  // the caches are others
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

extern "C" void lowtide_onnx_begin(OnnxAttend* attend, int num_past, int num_rows) {
    attend->masks.begin(num_past, num_rows);
    attend->has_ended = false;
}

extern "C" void lowtide_onnx_score_prompt(OnnxAttend* attend, int layer, const ScoreRule* rule, int is_last) {
    if (layer < 0)
        attend->prompt_scores.stop();
    else
        attend->prompt_scores.start(layer, *rule, is_last != 0);
}

extern "C" int lowtide_onnx_has_ended(const OnnxAttend* attend) { return attend->has_ended; }

extern "C" int lowtide_onnx_prompt_scores(const OnnxAttend* attend, float* scores, int size) {
    const int num_scored = attend->prompt_scores.num_scored();
    if (num_scored >= size) std::memcpy(scores, attend->prompt_scores.scores(), sizeof(float) * size);
    return num_scored;
}

extern "C" OnnxCounts lowtide_onnx_counts(const OnnxAttend* attend) {
    OnnxCounts counts = attend->counts;
    counts.scratch_bytes = int64_t(attend->scratch_bytes());
    return counts;
}

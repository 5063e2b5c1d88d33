// lowtide's attention in an ONNX graph: RoPE, append to the KV cache, and attend, in one call per layer.

#include "onnx/attention_op.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "containers.h"
#include "onnx/ort_abi.h"
#include "simd.h"
#include "sparse/gem.h"
#include "sparse/policy.h"

// The masks of a forward pass as fp16, (tokens, keys). Each is built once, and the next pass reuses its memory.
class OnnxMasks {
public:
    void begin(int num_past, int num_tokens);

    // The layer's mask; null if its bias has another shape. Throws std::bad_alloc.
    const uint16_t* mask_for(const OnnxLayer& layer, const OnnxAttentionInputs& inputs);

    int num_past() const { return num_past_; }
    int num_tokens() const { return num_tokens_; }
    int num_keys() const { return num_past_ + num_tokens_; }
    size_t num_bytes() const;

private:
    struct Mask {
        std::vector<uint16_t> values;
        bool is_built = false;
    };

    bool build(const OnnxLayer& layer, const OnnxAttentionInputs& inputs, uint16_t* values) const;

    std::vector<Mask> masks_;
    int num_past_ = 0, num_tokens_ = 0;
};

namespace {

// A bias of this size or below makes a key's weight vanish, so the key is masked and not read.
constexpr float kMaskThreshold = -1e4f;

uint16_t mask_value(const OnnxAttentionInputs& inputs, int64_t at) {
    if (inputs.bias_element == OnnxAttentionInputs::kBool) return reinterpret_cast<const uint8_t*>(inputs.bias)[at] != 0 ? 0 : kMaskedKey;
    const float bias = inputs.bias_element == OnnxAttentionInputs::kF32 ? reinterpret_cast<const float*>(inputs.bias)[at]
                                                           : fp16_to_float(reinterpret_cast<const uint16_t*>(inputs.bias)[at]);
    return bias <= kMaskThreshold ? kMaskedKey : float_to_fp16(bias);
}

}  // namespace

void OnnxMasks::begin(int num_past, int num_tokens) {
    num_past_ = num_past, num_tokens_ = num_tokens;
    for (Mask& mask : masks_) mask.is_built = false;
}

const uint16_t* OnnxMasks::mask_for(const OnnxLayer& layer, const OnnxAttentionInputs& inputs) {
    if (size_t(layer.mask) >= masks_.size()) masks_.resize(layer.mask + 1);
    Mask& mask = masks_[layer.mask];
    const size_t size = size_t(num_tokens_) * num_keys();
    if (mask.values.size() < size) mask.values.resize(size);
    if (!mask.is_built) mask.is_built = build(layer, inputs, mask.values.data());
    return mask.is_built ? mask.values.data() : nullptr;
}

bool OnnxMasks::build(const OnnxLayer& layer, const OnnxAttentionInputs& inputs, uint16_t* values) const {
    const int keys = num_keys();
    if (inputs.bias != nullptr && (inputs.bias_keys != keys || (inputs.bias_tokens != 1 && inputs.bias_tokens != num_tokens_)))
        return false;
    for (int token = 0; token < num_tokens_; ++token, values += keys) {
        const int seen = layer.is_causal ? num_past_ + token + 1 : keys;
        const int first = layer.is_causal && layer.window > 0 ? std::max(seen - layer.window, 0) : 0;
        const int64_t bias = inputs.bias_tokens == 1 ? 0 : int64_t(token) * keys;
        for (int key = 0; key < keys; ++key)
            values[key] = key < first || key >= seen ? kMaskedKey : inputs.bias != nullptr ? mask_value(inputs, bias + key) : 0;
    }
    return true;
}

size_t OnnxMasks::num_bytes() const {
    size_t total = 0;
    for (const Mask& mask : masks_) total += sizeof(uint16_t) * mask.values.size();
    return total;
}

namespace {

// With fewer multiplications, starting another thread takes longer than the work.
constexpr size_t kMinMultipliesPerThread = 30000;

size_t element_bytes(KvType type) { return type == KvType::f32 ? 4 : 2; }

void read_floats(const char* from, KvType element, int count, float* to) {
    if (element == KvType::f32) {
        std::memcpy(to, from, sizeof(float) * count);
        return;
    }
    const auto* values = reinterpret_cast<const uint16_t*>(from);
    for (int i = 0; i < count; ++i) to[i] = fp16_to_float(values[i]);
}

void write_floats(const float* from, KvType element, int count, char* to) {
    if (element == KvType::f32) {
        std::memcpy(to, from, sizeof(float) * count);
        return;
    }
    auto* values = reinterpret_cast<uint16_t*>(to);
    for (int i = 0; i < count; ++i) values[i] = float_to_fp16(from[i]);
}

// Rotary embedding (RoFormer, Su et al., arXiv 2104.09864) with the graph's cosines and sines.
void apply_rope(const OnnxLayer& layer, int position, int num_heads, float* heads) {
    if (layer.cosines == nullptr) return;
    const int pairs = layer.rotary_pairs, step = layer.interleaved ? 2 : 1, apart = layer.interleaved ? 1 : pairs;
    const float* cosines = layer.cosines + size_t(position) * pairs;
    const float* sines = layer.sines + size_t(position) * pairs;
    for (float* head = heads; head < heads + num_heads * layer.head_dim; head += layer.head_dim)
        for (int i = 0; i < pairs; ++i) {
            float &one = head[i * step], &other = head[i * step + apart];
            const float rotated = one * cosines[i] - other * sines[i];
            other = one * sines[i] + other * cosines[i];
            one = rotated;
        }
}

bool is_known_shape(const OnnxLayer& p, int num_layers) {
    const bool sized = p.head_dim > 0 && p.head_dim <= kMaxHeadDim && p.head_dim % 16 == 0;
    const bool keep_resident = KvType(p.cache_type) == KvType::f32 || KvType(p.cache_type) == KvType::f16;
    return sized && keep_resident && p.num_slots > 0 && p.num_kv_heads > 0 && p.num_heads > 0 && p.num_heads % p.num_kv_heads == 0 &&
           p.rotary_pairs >= 0 && 2 * p.rotary_pairs <= p.head_dim && p.mask >= 0 && p.mask < num_layers;
}

}  // namespace

class OnnxAttention : public WithHandle<OnnxAttention> {
public:
    OnnxAttention(const AttentionKernels& found, int max_threads)
        : kernels(found), num_threads(max_threads), num_active(max_threads) {}

    const AttentionKernels& kernels;
    const int num_threads;
    int num_active;  // of these, in the current pass
    std::vector<OnnxLayer> layers;
    OnnxMasks masks;
    CurrentPolicy policy;
    GemScorer gem;
    OnnxCounts counts{};
    bool has_ended = false;

    const char* run(int index, const OnnxAttentionInputs& inputs, ThreadGroup& threads) {
        const auto start = std::chrono::steady_clock::now();
        const OnnxLayer& layer = layers[index];
        if (masks.num_keys() > layer.num_slots) return "the KV cache has no such slots";
        reserve(layer, inputs);
        const uint16_t* mask = masks.mask_for(layer, inputs);
        if (mask == nullptr) return "the bias does not have one row per token and one column per key";
        AttentionProblem problem = problem_of(layer, inputs);
        problem.mask = reinterpret_cast<const char*>(mask), problem.mask_token_stride = sizeof(uint16_t) * masks.num_keys();
        const bool ends = gem.ends_at(index);
        if (!(ends ? gem.reserve(problem, threads.num_threads) : policy.reserve(problem, index, 0, threads.num_threads)))
            return "out of memory";
        threads.parallel_for([&](int thread) { append(layer, inputs, thread, threads.num_threads); }, [] {});
        if (ends) {
            gem.run(problem, kernels, threads);
            has_ended = true;
            return "the forward pass ends here, as requested";
        }
        const int num_read = policy.run(problem, index, 0, kernels, threads);
        threads.parallel_for([&](int thread) { write_output(layer, inputs, thread, threads.num_threads); }, [] {});
        counts.keys_read += num_read, counts.keys_visible += problem.num_keys, ++counts.nodes;
        counts.nanoseconds += (std::chrono::steady_clock::now() - start).count();
        return nullptr;
    }

    bool is_worth_threads(const OnnxLayer& layer) const {
        const size_t multiplies = size_t(masks.num_tokens()) * layer.num_heads * masks.num_keys() * layer.head_dim;
        return multiplies >= kMinMultipliesPerThread;
    }

    size_t scratch_bytes() const {
        return policy.scratch_bytes() + gem.scratch_bytes() + sizeof(float) * (queries_.size() + keys_.size() + out_.size()) +
               masks.num_bytes();
    }

private:
    void reserve(const OnnxLayer& layer, const OnnxAttentionInputs& inputs) {
        const size_t size = size_t(masks.num_tokens()) * layer.num_heads * layer.head_dim;
        const size_t kv_width = size_t(layer.num_kv_heads) * layer.head_dim;
        if (queries_.size() < size) queries_.resize(size);
        if (inputs.element != KvType::f32 && out_.size() < size) out_.resize(size);
        if (keys_.size() < kv_width * num_threads) keys_.resize(kv_width * num_threads);
    }

    void append(const OnnxLayer& layer, const OnnxAttentionInputs& inputs, int thread, int step) {
        const int width = layer.num_heads * layer.head_dim, kv_width = layer.num_kv_heads * layer.head_dim;
        const auto cache_type = KvType(layer.cache_type);
        const size_t element = element_bytes(inputs.element), all = width + 2 * size_t(kv_width);
        const size_t q_stride = element * (layer.is_packed ? all : width), kv_stride = element * (layer.is_packed ? all : kv_width);
        const char* key = layer.is_packed ? inputs.query + element * width : inputs.key;
        const char* value = layer.is_packed ? key + element * kv_width : inputs.value;
        float* rotated = keys_.data() + size_t(thread) * kv_width;
        for (int token = thread; token < masks.num_tokens(); token += step) {
            const int position = masks.num_past() + token;
            float* query = queries_.data() + size_t(token) * width;
            read_floats(inputs.query + token * q_stride, inputs.element, width, query);
            apply_rope(layer, position, layer.num_heads, query);
            const size_t slot = size_t(position) * kv_width * element_bytes(cache_type);
            read_floats(key + token * kv_stride, inputs.element, kv_width, rotated);
            apply_rope(layer, position, layer.num_kv_heads, rotated);
            write_floats(rotated, cache_type, kv_width, layer.k_cache + slot);
            read_floats(value + token * kv_stride, inputs.element, kv_width, rotated);
            write_floats(rotated, cache_type, kv_width, layer.v_cache + slot);
        }
    }

    AttentionProblem problem_of(const OnnxLayer& layer, const OnnxAttentionInputs& inputs) {
        const size_t head = layer.head_dim * sizeof(float), width = layer.num_heads * head;
        const size_t kv_head = layer.head_dim * element_bytes(KvType(layer.cache_type)), slot = layer.num_kv_heads * kv_head;
        AttentionProblem p{};
        p.q = reinterpret_cast<const char*>(queries_.data()), p.q_token_stride = width, p.q_head_stride = head;
        p.k = layer.k_cache, p.k_key_stride = slot, p.k_head_stride = kv_head;
        p.v = layer.v_cache, p.v_key_stride = slot, p.v_head_stride = kv_head;
        p.out = inputs.element == KvType::f32 ? inputs.out : reinterpret_cast<char*>(out_.data());
        p.out_token_stride = width, p.out_head_stride = head;
        p.k_type = p.v_type = KvType(layer.cache_type);
        p.num_tokens = masks.num_tokens(), p.num_keys = masks.num_keys();
        p.num_heads = layer.num_heads, p.num_kv_heads = layer.num_kv_heads, p.key_dim = p.value_dim = layer.head_dim;
        p.scale = layer.scale, p.softcap = layer.softcap, p.use_bf16 = policy.use_bf16;
        return p;
    }

    void write_output(const OnnxLayer& layer, const OnnxAttentionInputs& inputs, int thread, int step) {
        if (inputs.element == KvType::f32) return;
        const int width = layer.num_heads * layer.head_dim;
        for (int token = thread; token < masks.num_tokens(); token += step)
            write_floats(out_.data() + size_t(token) * width, inputs.element, width,
                         inputs.out + token * element_bytes(inputs.element) * width);
    }

    std::vector<float> queries_, keys_, out_;
};

OnnxAttention* find_onnx_attention(int64_t handle) { return OnnxAttention::find(handle); }

int num_tokens_of(const OnnxAttention& attention) { return attention.masks.num_tokens(); }

const OnnxLayer* layer_of(const OnnxAttention& attention, int64_t layer) {
    return layer >= 0 && layer < int64_t(attention.layers.size()) ? &attention.layers[layer] : nullptr;
}

int num_useful_threads(const OnnxAttention& attention, const OnnxLayer& layer) {
    return attention.is_worth_threads(layer) ? attention.num_active : 1;
}

const char* append_and_attend(OnnxAttention& attention, int64_t layer, const OnnxAttentionInputs& inputs, ThreadGroup& threads) {
    try {
        return attention.run(int(layer), inputs, threads);
    } catch (const std::bad_alloc&) {
        return "out of memory";
    }
}

extern "C" OnnxAttention* lowtide_onnx_new(const char* kernels, int num_threads) {
    const AttentionKernels* found = find_attention_kernels(kernels);
    if (found == nullptr || num_threads < 1) return nullptr;
    try {
        return new OnnxAttention(*found, num_threads);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

extern "C" void lowtide_onnx_free(OnnxAttention* attention) { delete attention; }

extern "C" int lowtide_onnx_supports_bf16(const OnnxAttention* attention) { return attention->kernels.attend_keys_bf16 != nullptr; }

extern "C" const char* lowtide_onnx_kernels(const OnnxAttention* attention) { return attention->kernels.name; }

extern "C" CurrentPolicy* lowtide_onnx_policy(OnnxAttention* attention) { return &attention->policy; }

extern "C" int64_t lowtide_onnx_handle(const OnnxAttention* attention) { return attention->handle; }

extern "C" int lowtide_onnx_set_layers(OnnxAttention* attention, const OnnxLayer* layers, int num_layers) {
    for (int i = 0; i < num_layers; ++i)
        if (!is_known_shape(layers[i], num_layers)) return 2;
    return error_code([=] {
        attention->layers.assign(layers, layers + num_layers);
        attention->policy.clear();  // the caches are new
        return true;
    });
}

extern "C" void lowtide_onnx_set_threads(OnnxAttention* attention, int num_threads) {
    attention->num_active = std::clamp(num_threads, 1, attention->num_threads);
}

extern "C" void lowtide_onnx_begin(OnnxAttention* attention, int num_past, int num_tokens) {
    attention->masks.begin(num_past, num_tokens);
    attention->has_ended = false;
}

extern "C" void lowtide_onnx_score_prompt(OnnxAttention* attention, int layer, const ScoreRule* rule, int is_last) {
    if (layer < 0)
        attention->gem.stop();
    else
        attention->gem.start(layer, *rule, is_last != 0);
}

extern "C" int lowtide_onnx_has_ended(const OnnxAttention* attention) { return attention->has_ended; }

extern "C" int lowtide_onnx_prompt_scores(const OnnxAttention* attention, float* scores, int size) {
    const int num_scored = attention->gem.num_scored();
    if (num_scored >= size) std::memcpy(scores, attention->gem.scores(), sizeof(float) * size);
    return num_scored;
}

extern "C" OnnxCounts lowtide_onnx_counts(const OnnxAttention* attention) {
    OnnxCounts counts = attention->counts;
    counts.scratch_bytes = int64_t(attention->scratch_bytes());
    return counts;
}

// The operators `lowtide::Attention` (float32) and `AttentionFp16` (float16), which replace attention nodes. They run
// on onnxruntime's threads, so that no other threads compete with them.
//
// Inputs: queries (or queries, keys and values packed), keys, values, and a bias of any type. All but the first are
// optional. The attributes `handle` and `layer` name the OnnxAttention and the layer.

namespace {

constexpr size_t kNumInputs = 4;

struct Node {
    explicit Node(Ort from) : ort(from) {}

    Ort ort;
    int64_t handle = 0, layer = 0;

    OrtStatus* read(const OrtKernelInfo* info) {
        if (OrtStatus* error = ort.int_attribute(info, "handle", &handle)) return error;
        return ort.int_attribute(info, "layer", &layer);
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        OnnxAttention* attention = find_onnx_attention(handle);
        const OnnxLayer* layer_config = attention == nullptr ? nullptr : layer_of(*attention, layer);
        if (layer_config == nullptr) return ort.error("lowtide: the attention of this node was closed");
        OrtTensor inputs[kNumInputs];
        size_t count = 0;
        if (OrtStatus* error = ort.num_inputs(context, &count)) return error;
        for (size_t i = 0; i < std::min(count, kNumInputs); ++i)
            if (OrtStatus* error = read_tensor(ort, context, i, inputs[i])) return error;
        OrtValue* out = nullptr;
        void* data = nullptr;
        const int64_t num_tokens = num_tokens_of(*attention), width = int64_t(layer_config->num_heads) * layer_config->head_dim;
        const int64_t dims[3] = {1, num_tokens, width};
        if (!are_inputs_valid(inputs, *layer_config, num_tokens))
            return ort.error("lowtide: queries, keys or values do not match the forward pass");
        if (OrtStatus* error = ort.output(context, 0, dims, 3, &out)) return error;
        if (OrtStatus* error = ort.data(out, &data)) return error;
        OrtThreadGroup threads(ort, context, num_useful_threads(*attention, *layer_config));
        const char* message = append_and_attend(*attention, layer, read_inputs(inputs, static_cast<char*>(data)), threads);
        return message == nullptr ? nullptr : ort.error(message);
    }

private:
    static bool are_inputs_valid(const OrtTensor* inputs, const OnnxLayer& layer, int64_t num_tokens) {
        const OrtTensor &q = inputs[0], &k = inputs[1], &v = inputs[2];
        const int64_t width = int64_t(layer.num_heads) * layer.head_dim, kv_width = int64_t(layer.num_kv_heads) * layer.head_dim;
        if (q.data == nullptr || num_tokens <= 0) return false;
        if (layer.is_packed) return q.size() == num_tokens * (width + 2 * kv_width);
        const bool have_all = k.data != nullptr && v.data != nullptr && k.element == q.element && v.element == q.element;
        return have_all && q.size() == num_tokens * width && k.size() == num_tokens * kv_width && v.size() == num_tokens * kv_width;
    }

    static OnnxAttentionInputs read_inputs(const OrtTensor* inputs, char* out) {
        OnnxAttentionInputs read{};
        read.query = inputs[0].data, read.key = inputs[1].data, read.value = inputs[2].data, read.out = out;
        read.element = inputs[0].element == kOrtFloat ? KvType::f32 : KvType::f16;
        const OrtTensor& bias = inputs[3];
        if (bias.data == nullptr) return read;
        read.bias = bias.data;
        read.bias_element = bias.element == kOrtBool    ? OnnxAttentionInputs::kBool
                            : bias.element == kOrtFloat ? OnnxAttentionInputs::kF32
                                                        : OnnxAttentionInputs::kF16;
        // The bias must be the same for all heads; others are refused.
        const size_t n = bias.num_dims;
        const bool is_known = n >= 2 && bias.size() == bias.dims[n - 2] * bias.dims[n - 1] &&
                              (bias.element == kOrtBool || bias.element == kOrtFloat || bias.element == kOrtFloat16);
        read.bias_tokens = is_known ? bias.dims[n - 2] : 0, read.bias_keys = is_known ? bias.dims[n - 1] : 0;
        return read;
    }
};

}  // namespace

OrtCustomOp attention_operator(bool is_fp16) {
    OrtCustomOp op = make_operator<Node>();
    op.name = is_fp16 ? [](const OrtCustomOp*) { return "AttentionFp16"; } : [](const OrtCustomOp*) { return "Attention"; };
    op.num_inputs = [](const OrtCustomOp*) { return kNumInputs; };
    if (is_fp16) {
        op.input_type = [](const OrtCustomOp*, size_t index) { return index < 3 ? kOrtFloat16 : kOrtUndefined; };
        op.output_type = [](const OrtCustomOp*, size_t) { return kOrtFloat16; };
    } else {
        op.input_type = [](const OrtCustomOp*, size_t index) { return index < 3 ? kOrtFloat : kOrtUndefined; };
        op.output_type = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
    }
    return op;
}

// The operator that a graph has in its attention's place: `lowtide::Attention` and `AttentionHalf`, of float32 and of
// float16. It runs inside onnxruntime's session, on its threads, so that nobody else's get in their way.
//
// Inputs: queries (or all three, packed), keys, values, and a bias of any type; all but the first may be missing.
// `attender` and `layer` say whose cache it is.

#include <algorithm>
#include <mutex>
#include <new>

#include "onnx_attend.h"
#include "ort_api.h"

namespace {

constexpr size_t kNumInputs = 4;
constexpr size_t kMostExtents = 8;

// onnxruntime's threads. None of them waits for another: it may give all of the work to one.
class OrtTeam : public Team {
public:
    OrtTeam(const Ort& ort, const OrtKernelContext* context, int num_threads) : Team(num_threads), ort_(ort), context_(context) {}

protected:
    void do_all(Work work, Call then) override {
        OrtStatus* failure = num_threads == 1 ? nullptr : ort_.each(context_, [](void* w, size_t i) { (*static_cast<Work*>(w))(int(i)); }, num_threads, &work);
        if (failure != nullptr) ort_.release(failure);
        if (failure != nullptr || num_threads == 1)
            for (int thread = 0; thread < num_threads; ++thread) work(thread);
        then();
    }
    void do_once(Call then) override { then(); }

private:
    const Ort& ort_;
    const OrtKernelContext* context_;
};

struct Tensor {
    const char* data = nullptr;
    int32_t element = kOrtUndefined;
    int64_t extents[kMostExtents] = {};
    size_t num_extents = 0;

    int64_t size() const {
        int64_t size = 1;
        for (size_t i = 0; i < num_extents; ++i) size *= extents[i];
        return size;
    }
};

struct Node {
    Ort ort;
    int64_t attender, layer;

    OrtStatus* compute(OrtKernelContext* context) const {
        OnnxAttend* attend = onnx_attend_of(attender);
        const OnnxLayer* known = attend == nullptr ? nullptr : layer_of(*attend, layer);
        if (known == nullptr) return ort.failure("lowtide: nothing attends for this node");
        Tensor inputs[kNumInputs];
        size_t count = 0;
        if (OrtStatus* failure = ort.num_inputs(context, &count)) return failure;
        for (size_t i = 0; i < std::min(count, kNumInputs); ++i)
            if (OrtStatus* failure = read(context, i, inputs[i])) return failure;
        OrtValue* out = nullptr;
        void* data = nullptr;
        const int64_t num_rows = num_rows_of(*attend), width = int64_t(known->num_heads) * known->head_size;
        const int64_t extents[3] = {1, num_rows, width};
        if (!are_rows(inputs, *known, num_rows)) return ort.failure("lowtide: queries, keys or values are not those of the pass");
        if (OrtStatus* failure = ort.output(context, 0, extents, 3, &out)) return failure;
        if (OrtStatus* failure = ort.data(out, &data)) return failure;
        OrtTeam team(ort, context, threads_that_pay(*attend, *known));
        const char* wrong = attend_rows(*attend, layer, rows_of(inputs, static_cast<char*>(data)), team);
        return wrong == nullptr ? nullptr : ort.failure(wrong);
    }

private:
    OrtStatus* read(OrtKernelContext* context, size_t index, Tensor& tensor) const {
        const OrtValue* value = nullptr;
        if (OrtStatus* failure = ort.input(context, index, &value)) return failure;
        if (value == nullptr) return nullptr;
        void* data = nullptr;
        OrtTensorTypeAndShapeInfo* info = nullptr;
        if (OrtStatus* failure = ort.data(const_cast<OrtValue*>(value), &data)) return failure;
        if (OrtStatus* failure = ort.shape(value, &info)) return failure;
        tensor.data = static_cast<const char*>(data);
        OrtStatus* failure = ort.element(info, &tensor.element);
        if (failure == nullptr) failure = ort.num_extents(info, &tensor.num_extents);
        if (failure == nullptr && tensor.num_extents > kMostExtents) failure = ort.failure("lowtide: a tensor has too many extents");
        if (failure == nullptr) failure = ort.extents(info, tensor.extents, tensor.num_extents);
        ort.release(info);
        return failure;
    }

    static bool are_rows(const Tensor* inputs, const OnnxLayer& layer, int64_t num_rows) {
        const Tensor &q = inputs[0], &k = inputs[1], &v = inputs[2];
        const int64_t width = int64_t(layer.num_heads) * layer.head_size, kv_width = int64_t(layer.num_kv_heads) * layer.head_size;
        if (q.data == nullptr || num_rows <= 0) return false;
        if (layer.is_packed) return q.size() == num_rows * (width + 2 * kv_width);
        const bool have_all = k.data != nullptr && v.data != nullptr && k.element == q.element && v.element == q.element;
        return have_all && q.size() == num_rows * width && k.size() == num_rows * kv_width && v.size() == num_rows * kv_width;
    }

    static OnnxRows rows_of(const Tensor* inputs, char* out) {
        OnnxRows rows{};
        rows.query = inputs[0].data, rows.key = inputs[1].data, rows.value = inputs[2].data, rows.out = out;
        rows.element = inputs[0].element == kOrtFloat ? KvType::f32 : KvType::f16;
        const Tensor& bias = inputs[3];
        if (bias.data == nullptr) return rows;
        rows.bias = bias.data;
        rows.bias_element = bias.element == kOrtBool ? OnnxRows::kBool : bias.element == kOrtFloat ? OnnxRows::kF32 : OnnxRows::kF16;
        // One for all heads: of any other, nothing is read.
        const size_t n = bias.num_extents;
        const bool is_known = n >= 2 && bias.size() == bias.extents[n - 2] * bias.extents[n - 1] &&
                              (bias.element == kOrtBool || bias.element == kOrtFloat || bias.element == kOrtFloat16);
        rows.bias_rows = is_known ? bias.extents[n - 2] : 0, rows.bias_keys = is_known ? bias.extents[n - 1] : 0;
        return rows;
    }
};

OrtStatus* make_node(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    Node node{Ort(api), 0, 0};
    if (OrtStatus* failure = node.ort.number(info, "attender", &node.attender)) return failure;
    if (OrtStatus* failure = node.ort.number(info, "layer", &node.layer)) return failure;
    *kernel = new (std::nothrow) Node(node);
    return *kernel == nullptr ? node.ort.failure("lowtide: no memory for a node") : nullptr;
}

OrtCustomOp operator_of(bool is_half) {
    OrtCustomOp op{};
    op.version = kOrtVersion;
    op.name = is_half ? [](const OrtCustomOp*) { return "AttentionHalf"; } : [](const OrtCustomOp*) { return "Attention"; };
    op.provider = [](const OrtCustomOp*) -> const char* { return nullptr; };
    op.num_inputs = [](const OrtCustomOp*) { return kNumInputs; };
    op.num_outputs = [](const OrtCustomOp*) -> size_t { return 1; };
    if (is_half) {
        op.input_type = [](const OrtCustomOp*, size_t index) { return index < 3 ? kOrtFloat16 : kOrtUndefined; };
        op.output_type = [](const OrtCustomOp*, size_t) { return kOrtFloat16; };
    } else {
        op.input_type = [](const OrtCustomOp*, size_t index) { return index < 3 ? kOrtFloat : kOrtUndefined; };
        op.output_type = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
    }
    op.input_presence = [](const OrtCustomOp*, size_t index) { return index == 0 ? kOrtRequired : kOrtOptional; };
    op.output_presence = [](const OrtCustomOp*, size_t) { return kOrtRequired; };
    op.input_memory = [](const OrtCustomOp*, size_t) -> int32_t { return 0; };
    op.create_kernel_v2 = make_node;
    op.compute_v2 = [](void* kernel, OrtKernelContext* context) { return static_cast<const Node*>(kernel)->compute(context); };
    op.destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
    return op;
}

}  // namespace

// onnxruntime looks for this name in a library that a session is given. The domain lives as long as the process: a
// session may.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->get_api(kOrtVersion);
    if (api == nullptr) return Ort(base->get_api(1)).failure("lowtide: this onnxruntime is too old, 1.18 is wanted");
    static const OrtCustomOp operators[] = {operator_of(false), operator_of(true)};
    static OrtCustomOpDomain* domain = nullptr;
    static std::mutex making;  // two threads may open a model each
    const std::lock_guard<std::mutex> lock(making);
    const Ort ort(api);
    if (domain == nullptr) {
        if (OrtStatus* failure = ort.make_domain("lowtide", &domain)) return failure;
        for (const OrtCustomOp& op : operators)
            if (OrtStatus* failure = ort.add(domain, &op)) return failure;
    }
    return ort.add(options, domain);
}

// The operator that a graph has in its attention's place: `lowtide::Attention` and `AttentionHalf`, of float32 and of
// float16. It runs inside onnxruntime's session, on its threads, so that nobody else's get in their way.
//
// Inputs: queries (or all three, packed), keys, values, and a bias of any type; all but the first may be missing.
// `attender` and `layer` say whose cache it is.

#include <algorithm>

#include "onnx_attend.h"
#include "ort_kernel.h"

namespace {

constexpr size_t kNumInputs = 4;

struct Node {
    Ort ort;
    int64_t attender = 0, layer = 0;

    OrtStatus* read(const OrtKernelInfo* info) {
        if (OrtStatus* failure = ort.number(info, "attender", &attender)) return failure;
        return ort.number(info, "layer", &layer);
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        OnnxAttend* attend = onnx_attend_of(attender);
        const OnnxLayer* known = attend == nullptr ? nullptr : layer_of(*attend, layer);
        if (known == nullptr) return ort.failure("lowtide: nothing attends for this node");
        OrtTensor inputs[kNumInputs];
        size_t count = 0;
        if (OrtStatus* failure = ort.num_inputs(context, &count)) return failure;
        for (size_t i = 0; i < std::min(count, kNumInputs); ++i)
            if (OrtStatus* failure = read_tensor(ort, context, i, inputs[i])) return failure;
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
    static bool are_rows(const OrtTensor* inputs, const OnnxLayer& layer, int64_t num_rows) {
        const OrtTensor &q = inputs[0], &k = inputs[1], &v = inputs[2];
        const int64_t width = int64_t(layer.num_heads) * layer.head_size, kv_width = int64_t(layer.num_kv_heads) * layer.head_size;
        if (q.data == nullptr || num_rows <= 0) return false;
        if (layer.is_packed) return q.size() == num_rows * (width + 2 * kv_width);
        const bool have_all = k.data != nullptr && v.data != nullptr && k.element == q.element && v.element == q.element;
        return have_all && q.size() == num_rows * width && k.size() == num_rows * kv_width && v.size() == num_rows * kv_width;
    }

    static OnnxRows rows_of(const OrtTensor* inputs, char* out) {
        OnnxRows rows{};
        rows.query = inputs[0].data, rows.key = inputs[1].data, rows.value = inputs[2].data, rows.out = out;
        rows.element = inputs[0].element == kOrtFloat ? KvType::f32 : KvType::f16;
        const OrtTensor& bias = inputs[3];
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

}  // namespace

OrtCustomOp attention_operator(bool is_half) {
    OrtCustomOp op = operator_of_nodes<Node>();
    op.name = is_half ? [](const OrtCustomOp*) { return "AttentionHalf"; } : [](const OrtCustomOp*) { return "Attention"; };
    op.num_inputs = [](const OrtCustomOp*) { return kNumInputs; };
    if (is_half) {
        op.input_type = [](const OrtCustomOp*, size_t index) { return index < 3 ? kOrtFloat16 : kOrtUndefined; };
        op.output_type = [](const OrtCustomOp*, size_t) { return kOrtFloat16; };
    } else {
        op.input_type = [](const OrtCustomOp*, size_t index) { return index < 3 ? kOrtFloat : kOrtUndefined; };
        op.output_type = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
    }
    return op;
}

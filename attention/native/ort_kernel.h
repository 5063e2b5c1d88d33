#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "ort_api.h"
#include "team.h"

// What the kernels of our operators in onnxruntime's graphs share.

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

// An input. Without data it is missing.
struct OrtTensor {
    static constexpr size_t kMostExtents = 8;

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

// Reads input `index` of a kernel; of one that is missing, nothing.
inline OrtStatus* read_tensor(const Ort& ort, OrtKernelContext* context, size_t index, OrtTensor& tensor) {
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
    if (failure == nullptr && tensor.num_extents > OrtTensor::kMostExtents) failure = ort.failure("lowtide: a tensor has too many extents");
    if (failure == nullptr) failure = ort.extents(info, tensor.extents, tensor.num_extents);
    ort.release(info);
    return failure;
}

// The operator whose nodes are `Node`s, of one output: what is left is its name, its inputs and its output's type. A
// `Node` is made of an `Ort`, reads its attributes with `OrtStatus* read(const OrtKernelInfo*)`, and computes with
// `OrtStatus* compute(OrtKernelContext*) const`.
template <class Node> OrtCustomOp operator_of_nodes() {
    OrtCustomOp op{};
    op.version = kOrtVersion;
    op.provider = [](const OrtCustomOp*) -> const char* { return nullptr; };
    op.num_outputs = [](const OrtCustomOp*) -> size_t { return 1; };
    op.input_presence = [](const OrtCustomOp*, size_t index) { return index == 0 ? kOrtRequired : kOrtOptional; };
    op.output_presence = [](const OrtCustomOp*, size_t) { return kOrtRequired; };
    op.input_memory = [](const OrtCustomOp*, size_t) -> int32_t { return 0; };
    op.create_kernel_v2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
        Node node{Ort(api)};
        if (OrtStatus* failure = node.read(info)) return failure;
        *kernel = new (std::nothrow) Node(node);
        return *kernel == nullptr ? node.ort.failure("lowtide: no memory for a node") : nullptr;
    };
    op.compute_v2 = [](void* kernel, OrtKernelContext* context) { return static_cast<const Node*>(kernel)->compute(context); };
    op.destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
    return op;
}

// The operators of our domain.
OrtCustomOp attention_operator(bool is_half);
OrtCustomOp product_operator();
OrtCustomOp rows_operator();

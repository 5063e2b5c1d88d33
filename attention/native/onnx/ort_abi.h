#pragma once

// The parts of onnxruntime's C interface that lowtide uses, as of version 18 (onnxruntime 1.18), and what its
// operators share. Later versions only add to the end; functions are found by their index.

#include <cstddef>
#include <cstdint>
#include <new>

#include "threads.h"

constexpr uint32_t kOrtVersion = 18;

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

enum OrtElement : int32_t { kOrtUndefined = 0, kOrtFloat = 1, kOrtInt64 = 7, kOrtBool = 9, kOrtFloat16 = 10 };
enum OrtPresence : int32_t { kOrtRequired = 0, kOrtOptional = 1 };

struct OrtApi {
    const void* functions[280];
};

struct OrtApiBase {
    const OrtApi* (*get_api)(uint32_t version);
    const char* (*get_version)();
};

// A custom operator, as a library gives it to a session.
struct OrtCustomOp {
    uint32_t version;
    void* (*create_kernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char* (*name)(const OrtCustomOp*);
    const char* (*provider)(const OrtCustomOp*);
    OrtElement (*input_type)(const OrtCustomOp*, size_t index);
    size_t (*num_inputs)(const OrtCustomOp*);
    OrtElement (*output_type)(const OrtCustomOp*, size_t index);
    size_t (*num_outputs)(const OrtCustomOp*);
    void (*compute)(void* kernel, OrtKernelContext*);
    void (*destroy)(void* kernel);
    OrtPresence (*input_presence)(const OrtCustomOp*, size_t index);
    OrtPresence (*output_presence)(const OrtCustomOp*, size_t index);
    int32_t (*input_memory)(const OrtCustomOp*, size_t index);
    int (*variadic_input_least)(const OrtCustomOp*);
    int (*variadic_input_is_uniform)(const OrtCustomOp*);
    int (*variadic_output_least)(const OrtCustomOp*);
    int (*variadic_output_is_uniform)(const OrtCustomOp*);
    OrtStatus* (*create_kernel_v2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*compute_v2)(void* kernel, OrtKernelContext*);
    const void* more[8];  // the rest of version 18, all null
};

// Calls functions by index.
class Ort {
public:
    explicit Ort(const OrtApi* api) : api_(api) {}

    OrtStatus* error(const char* words) const { return call<OrtStatus* (*)(int, const char*)>(0)(1, words); }
    OrtStatus* create_domain(const char* name, OrtCustomOpDomain** out) const {
        return call<OrtStatus* (*)(const char*, OrtCustomOpDomain**)>(26)(name, out);
    }
    OrtStatus* add(OrtCustomOpDomain* domain, const OrtCustomOp* op) const {
        return call<OrtStatus* (*)(OrtCustomOpDomain*, const OrtCustomOp*)>(27)(domain, op);
    }
    OrtStatus* add(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
        return call<OrtStatus* (*)(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
    }
    OrtStatus* data(OrtValue* value, void** out) const { return call<OrtStatus* (*)(OrtValue*, void**)>(51)(value, out); }
    OrtStatus* element(const OrtTensorTypeAndShapeInfo* info, int32_t* out) const {
        return call<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int32_t*)>(60)(info, out);
    }
    OrtStatus* num_dims(const OrtTensorTypeAndShapeInfo* info, size_t* out) const {
        return call<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, out);
    }
    OrtStatus* dims(const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count) const {
        return call<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(info, out, count);
    }
    OrtStatus* shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) const {
        return call<OrtStatus* (*)(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, out);
    }
    OrtStatus* int_attribute(const OrtKernelInfo* info, const char* name, int64_t* out) const {
        return call<OrtStatus* (*)(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, out);
    }
    OrtStatus* num_inputs(const OrtKernelContext* context, size_t* out) const {
        return call<OrtStatus* (*)(const OrtKernelContext*, size_t*)>(88)(context, out);
    }
    OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** out) const {
        return call<OrtStatus* (*)(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, out);
    }
    OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t count, OrtValue** out) const {
        return call<OrtStatus* (*)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(context, index, dims, count, out);
    }
    void release(OrtStatus* status) const { call<void (*)(OrtStatus*)>(93)(status); }
    void release(OrtTensorTypeAndShapeInfo* info) const { call<void (*)(OrtTensorTypeAndShapeInfo*)>(99)(info); }
    OrtStatus* parallel_for(const OrtKernelContext* context, void (*work)(void*, size_t), size_t count, void* context_data) const {
        using ParallelFor = OrtStatus* (*)(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
        return call<ParallelFor>(274)(context, work, count, count, context_data);
    }

private:
    template <class Function> Function call(int place) const { return reinterpret_cast<Function>(const_cast<void*>(api_->functions[place])); }

    const OrtApi* api_;
};

// onnxruntime's threads. None of them may wait for another: onnxruntime may run all of the work on one.
class OrtThreadGroup : public ThreadGroup {
public:
    OrtThreadGroup(const Ort& ort, const OrtKernelContext* context, int count) : ThreadGroup(count), ort_(ort), context_(context) {}

protected:
    void do_parallel_for(Work work, Call then) override {
        OrtStatus* error =
            num_threads == 1 ? nullptr
                             : ort_.parallel_for(context_, [](void* w, size_t i) { (*static_cast<Work*>(w))(int(i)); }, num_threads, &work);
        if (error != nullptr) ort_.release(error);
        if (error != nullptr || num_threads == 1)
            for (int thread = 0; thread < num_threads; ++thread) work(thread);
        then();
    }
    void do_single(Call then) override { then(); }

private:
    const Ort& ort_;
    const OrtKernelContext* context_;
};

// An input. A missing input has no data.
struct OrtTensor {
    static constexpr size_t kMaxDims = 8;

    const char* data = nullptr;
    int32_t element = kOrtUndefined;
    int64_t dims[kMaxDims] = {};
    size_t num_dims = 0;

    int64_t size() const {
        int64_t size = 1;
        for (size_t i = 0; i < num_dims; ++i) size *= dims[i];
        return size;
    }
};

// Reads input `index` of a kernel; leaves `tensor` as it is if the input is missing.
inline OrtStatus* read_tensor(const Ort& ort, OrtKernelContext* context, size_t index, OrtTensor& tensor) {
    const OrtValue* value = nullptr;
    if (OrtStatus* error = ort.input(context, index, &value)) return error;
    if (value == nullptr) return nullptr;
    void* data = nullptr;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (OrtStatus* error = ort.data(const_cast<OrtValue*>(value), &data)) return error;
    if (OrtStatus* error = ort.shape(value, &info)) return error;
    tensor.data = static_cast<const char*>(data);
    OrtStatus* error = ort.element(info, &tensor.element);
    if (error == nullptr) error = ort.num_dims(info, &tensor.num_dims);
    if (error == nullptr && tensor.num_dims > OrtTensor::kMaxDims) error = ort.error("lowtide: a tensor has too many dimensions");
    if (error == nullptr) error = ort.dims(info, tensor.dims, tensor.num_dims);
    ort.release(info);
    return error;
}

// A custom operator of one output, whose nodes are `Node`s. The caller sets its name, its inputs and its output type.
// A `Node` is made from an `Ort`, reads its attributes with `OrtStatus* read(const OrtKernelInfo*)` and computes with
// `OrtStatus* compute(OrtKernelContext*) const`.
template <class Node> OrtCustomOp make_operator() {
    OrtCustomOp op{};
    op.version = kOrtVersion;
    op.provider = [](const OrtCustomOp*) -> const char* { return nullptr; };
    op.num_outputs = [](const OrtCustomOp*) -> size_t { return 1; };
    op.input_presence = [](const OrtCustomOp*, size_t index) { return index == 0 ? kOrtRequired : kOrtOptional; };
    op.output_presence = [](const OrtCustomOp*, size_t) { return kOrtRequired; };
    op.input_memory = [](const OrtCustomOp*, size_t) -> int32_t { return 0; };
    op.create_kernel_v2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
        Node node(Ort{api});
        if (OrtStatus* error = node.read(info)) return error;
        *kernel = new (std::nothrow) Node(node);
        return *kernel == nullptr ? node.ort.error("lowtide: no memory for a node") : nullptr;
    };
    op.compute_v2 = [](void* kernel, OrtKernelContext* context) { return static_cast<const Node*>(kernel)->compute(context); };
    op.destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
    return op;
}

// lowtide's operators.
OrtCustomOp attention_operator(bool is_fp16);
OrtCustomOp matmul_operator();
OrtCustomOp gather_operator();

#pragma once

#include <cstddef>
#include <cstdint>

// The part of onnxruntime's C interface that our operator needs, as its version 18 has it (onnxruntime 1.18). Later
// versions only add to the end; functions are found by their place.
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

// The operators that a library gives to a session.
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
    const void* more[8];  // what version 18 knows beside: all null
};

// Calls by place.
class Ort {
public:
    explicit Ort(const OrtApi* api) : api_(api) {}

    OrtStatus* failure(const char* words) const { return call<OrtStatus* (*)(int, const char*)>(0)(1, words); }
    OrtStatus* make_domain(const char* name, OrtCustomOpDomain** out) const {
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
    OrtStatus* num_extents(const OrtTensorTypeAndShapeInfo* info, size_t* out) const {
        return call<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, out);
    }
    OrtStatus* extents(const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count) const {
        return call<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(info, out, count);
    }
    OrtStatus* shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) const {
        return call<OrtStatus* (*)(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, out);
    }
    OrtStatus* number(const OrtKernelInfo* info, const char* name, int64_t* out) const {
        return call<OrtStatus* (*)(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, out);
    }
    OrtStatus* num_inputs(const OrtKernelContext* context, size_t* out) const {
        return call<OrtStatus* (*)(const OrtKernelContext*, size_t*)>(88)(context, out);
    }
    OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** out) const {
        return call<OrtStatus* (*)(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, out);
    }
    OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* extents, size_t count, OrtValue** out) const {
        return call<OrtStatus* (*)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(context, index, extents, count, out);
    }
    void release(OrtStatus* status) const { call<void (*)(OrtStatus*)>(93)(status); }
    void release(OrtTensorTypeAndShapeInfo* info) const { call<void (*)(OrtTensorTypeAndShapeInfo*)>(99)(info); }
    OrtStatus* each(const OrtKernelContext* context, void (*work)(void*, size_t), size_t count, void* given) const {
        using ParallelFor = OrtStatus* (*)(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
        return call<ParallelFor>(274)(context, work, count, count, given);
    }

private:
    template <class Function> Function call(int place) const { return reinterpret_cast<Function>(api_->functions[place]); }

    const OrtApi* api_;
};

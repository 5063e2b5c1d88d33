// Registers lowtide's operators with onnxruntime.

#include <mutex>

#include "c_api.h"
#include "onnx/ort_abi.h"

// onnxruntime calls this function, by its name, in a library that a session is given. The domain lives as long as the
// process, since a session may.
LOWTIDE_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->get_api(kOrtVersion);
    if (api == nullptr) return Ort(base->get_api(1)).error("lowtide needs onnxruntime 1.18 or later");
    static const OrtCustomOp operators[] = {attention_operator(false), attention_operator(true), matmul_operator(), gather_operator()};
    static OrtCustomOpDomain* domain = nullptr;
    static std::mutex making;  // two threads may open a model at once
    const std::lock_guard<std::mutex> lock(making);
    const Ort ort(api);
    if (domain == nullptr) {
        if (OrtStatus* error = ort.create_domain("lowtide", &domain)) return error;
        for (const OrtCustomOp& op : operators)
            if (OrtStatus* error = ort.add(domain, &op)) return error;
    }
    return ort.add(options, domain);
}

// What onnxruntime calls in a library that has operators of its own.

#include <mutex>

#include "ort_kernel.h"

// onnxruntime looks for this name in a library that a session is given. The domain lives as long as the process: a
// session may.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->get_api(kOrtVersion);
    if (api == nullptr) return Ort(base->get_api(1)).failure("lowtide: this onnxruntime is too old, 1.18 is wanted");
    static const OrtCustomOp operators[] = {attention_operator(false), attention_operator(true), product_operator(), rows_operator()};
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

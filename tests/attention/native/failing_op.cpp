// An operation of a graph whose assertion fails, on the threads and at the pass that a test asks for.

#include <atomic>
#include <cstdint>
#include <cstring>

#include "c_api.h"
#include "llama/ggml_abi.h"

namespace {

using Abort = void (*)(const char* file, int line, const char* format, ...);

struct FailingOp {
    GgmlOps ops;
    int32_t params[16];
    Abort abort;
    int failing_thread;  // -1: every thread
    std::atomic<bool> armed;
} op;

// Writes zeros, or fails.
void compute(GgmlTensor* node, int thread, int, void*) {
    if (op.armed && (op.failing_thread < 0 || thread == op.failing_thread))
        op.abort("failing_op.cpp", 1, "GGML_ASSERT(%s) failed", "value < limit");
    if (thread == 0) std::memset(node->data, 0, size_t(node->ne[0] * node->ne[1]) * sizeof(float));
}

}  // namespace

// Returns a message, or null.
LOWTIDE_API const char* failing_op_prepare(const GgmlFunctions* ggml, void* abort, int failing_thread) {
    op.abort = reinterpret_cast<Abort>(abort), op.failing_thread = failing_thread;
    const CustomOp custom{compute, nullptr, op.params};
    return read_ggml_abi(*ggml, op.ops, &custom, 1);
}

LOWTIDE_API void failing_op_arm(int armed) { op.armed = armed != 0; }

// The evaluation callback: one layer's feed-forward network becomes the failing operation.
LOWTIDE_API bool failing_op_callback(void* tensor, bool ask, void*) {
    auto* node = static_cast<GgmlTensor*>(tensor);
    if (ask && std::strcmp(node->name, "ffn_out-1") == 0) {
        node->op = op.ops.custom;
        std::memcpy(node->op_params, op.params, sizeof node->op_params);
    }
    return false;
}

// lowtide's matmul and row lookup in an ONNX graph.

#include "onnx/matmul_op.h"

#include <algorithm>
#include <new>
#include <vector>

#include "containers.h"
#include "matmul/matmul.h"
#include "matmul/repack.h"
#include "onnx/ort_abi.h"

namespace {

// With fewer multiplications, or fewer values to quantise, starting another thread takes longer than the work.
constexpr int64_t kMinMultipliesPerThread = 60000, kMinValuesPerThread = 8000;

}  // namespace

class OnnxMatmul : public WithHandle<OnnxMatmul> {
public:
    OnnxMatmul(const MatmulKernels& found, const RepackedMatrix* first, int num_matrices, int max_threads)
        : kernels(found), matrices(first, first + num_matrices), num_threads(max_threads), num_active(max_threads) {}

    const MatmulKernels& kernels;
    const std::vector<RepackedMatrix> matrices;
    const int num_threads;
    int num_active;  // of these, in the current pass
    Matmul matmul;
    int64_t num_nodes = 0;

    void begin() { has_input_ = false; }

    void multiply(const RepackedMatrix& matrix, const MatmulInput& input, float* out, ThreadGroup& threads) {
        const int num_rows = int(input.num_rows), columns = matrix.num_columns;
        if (!shape_of(Format(matrix.format)).is_float() && !(has_input_ && input_id_ == input.id)) {
            if (input.num_rows * columns < kMinValuesPerThread)
                matmul.quantise(input.values, columns, num_rows, columns, kernels, 0, 1);
            else
                threads.parallel_for(
                    [&](int thread) { matmul.quantise(input.values, columns, num_rows, columns, kernels, thread, threads.num_threads); },
                    [] {});
            has_input_ = true, input_id_ = input.id;
        }
        matmul.restart(0);
        const FloatRows floats{num_rows, size_t(columns), input.values};
        const MatmulTarget target{matrix, out, size_t(matrix.num_rows)};
        threads.parallel_for(
            [&](int thread) {
                matmul.multiply(target, floats, 0, kernels, nullptr, thread, threads.num_threads);
            },
            [] {});
        for (int64_t i = 0; i < input.num_rows && input.bias != nullptr; ++i)
            for (int j = 0; j < matrix.num_rows; ++j) out[i * matrix.num_rows + j] += input.bias[j];
        ++num_nodes;
    }

private:
    int64_t input_id_ = 0;
    bool has_input_ = false;  // whether `matmul` has the quantised rows of `input_id_`
};

OnnxMatmul* find_onnx_matmul(int64_t int_attribute) { return OnnxMatmul::find(int_attribute); }

const RepackedMatrix* matrix_of(const OnnxMatmul& graph, int64_t index) {
    return index >= 0 && index < int64_t(graph.matrices.size()) ? &graph.matrices[index] : nullptr;
}

int num_useful_threads(const OnnxMatmul& graph, int64_t index, int64_t num_rows) {
    const RepackedMatrix& matrix = graph.matrices[index];
    return num_rows * matrix.num_rows * matrix.num_columns < kMinMultipliesPerThread ? 1 : graph.num_active;
}

const char* multiply_inputs(OnnxMatmul& graph, int64_t index, const MatmulInput& input, float* out, ThreadGroup& threads) {
    const RepackedMatrix& matrix = graph.matrices[index];
    if (input.num_rows > INT32_MAX || !graph.matmul.has_room(int(input.num_rows), matrix.num_columns))
        return "lowtide: a matmul has more rows than were reserved";
    graph.multiply(matrix, input, out, threads);
    return nullptr;
}

void gather_rows(OnnxMatmul& graph, int64_t index, const int64_t* ids, int64_t num_ids, float* out) {
    const RepackedMatrix& matrix = graph.matrices[index];
    for (int64_t i = 0; i < num_ids; ++i, out += matrix.num_columns) {
        if (ids[i] >= 0 && ids[i] < matrix.num_rows)
            dequantise_row(matrix, int(ids[i]), out);
        else
            std::fill(out, out + matrix.num_columns, 0.0f);
    }
    ++graph.num_nodes;
}

extern "C" OnnxMatmul* lowtide_onnx_matmul_new(const RepackedMatrix* matrices, int num_matrices, int max_rows, int num_threads) {
    const MatmulKernels* kernels = find_matmul_kernels(nullptr);
    if (kernels == nullptr || num_matrices < 1 || max_rows < 1 || num_threads < 1) return nullptr;
    int max_columns = 0;
    for (const RepackedMatrix* matrix = matrices; matrix != matrices + num_matrices; ++matrix) {
        if (matrix->tiles == nullptr || lowtide_repacked_bytes(matrix->format, matrix->num_rows, matrix->num_columns) == 0) return nullptr;
        max_columns = std::max(max_columns, matrix->num_columns);
    }
    OnnxMatmul* created = nullptr;
    try {
        created = new OnnxMatmul(*kernels, matrices, num_matrices, num_threads);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
    if (created->matmul.reserve(max_rows, max_columns, num_threads)) return created;
    delete created;
    return nullptr;
}

extern "C" void lowtide_onnx_matmul_free(OnnxMatmul* graph) { delete graph; }

extern "C" int64_t lowtide_onnx_matmul_handle(const OnnxMatmul* graph) { return graph->handle; }

extern "C" void lowtide_onnx_matmul_set_threads(OnnxMatmul* graph, int num_threads) {
    graph->num_active = std::clamp(num_threads, 1, graph->num_threads);
}

extern "C" void lowtide_onnx_matmul_begin(OnnxMatmul* graph) { graph->begin(); }

extern "C" OnnxMatmulCounts lowtide_onnx_matmul_counts(const OnnxMatmul* graph) {
    return {graph->num_nodes, int64_t(graph->matmul.scratch_bytes())};
}

// The operators `lowtide::RepackedMatMul` and `lowtide::RepackedGather`, which replace quantised matmuls and lookups of
// rows in such a matrix. Their attributes `handle` and `matrix` name the OnnxMatmul and the matrix. They must not have
// the name of an ONNX operator: some of onnxruntime's graph optimizations look at the name without the domain.
//
// RepackedMatMul's inputs are rows of float32 and an optional bias; its attribute `input` is a number that stands for
// the name of the input tensor. RepackedGather's input is the indices of rows as int64.

namespace {

struct Node {
    explicit Node(Ort from) : ort(from) {}

    Ort ort;
    int64_t handle = 0, index = 0;

    OrtStatus* read(const OrtKernelInfo* info) {
        if (OrtStatus* error = ort.int_attribute(info, "handle", &handle)) return error;
        return ort.int_attribute(info, "matrix", &index);
    }

protected:
    OrtStatus* no_matmul() const { return ort.error("lowtide: the matmul of this node was closed"); }

    // The output: the first dimensions of `like`, then `last`.
    OrtStatus* output(OrtKernelContext* context, const OrtTensor& like, size_t num_leading, int64_t last, float** data) const {
        int64_t dims[OrtTensor::kMaxDims + 1];
        for (size_t i = 0; i < num_leading; ++i) dims[i] = like.dims[i];
        dims[num_leading] = last;
        OrtValue* out = nullptr;
        void* found = nullptr;
        OrtStatus* error = ort.output(context, 0, dims, num_leading + 1, &out);
        if (error == nullptr) error = ort.data(out, &found);
        *data = static_cast<float*>(found);
        return error;
    }
};

struct MatmulNode : Node {
    using Node::Node;

    int64_t input_id = 0;

    OrtStatus* read(const OrtKernelInfo* info) {
        if (OrtStatus* error = Node::read(info)) return error;
        return ort.int_attribute(info, "input", &input_id);
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        OnnxMatmul* graph = find_onnx_matmul(handle);
        const RepackedMatrix* matrix = graph == nullptr ? nullptr : matrix_of(*graph, index);
        if (matrix == nullptr) return no_matmul();
        OrtTensor x, bias;
        size_t count = 0;
        if (OrtStatus* error = ort.num_inputs(context, &count)) return error;
        if (OrtStatus* error = read_tensor(ort, context, 0, x)) return error;
        if (OrtStatus* error = count > 1 ? read_tensor(ort, context, 1, bias) : nullptr) return error;
        const bool is_bias = bias.data == nullptr || bias.size() == matrix->num_rows;
        if (x.num_dims == 0 || x.dims[x.num_dims - 1] != matrix->num_columns || !is_bias)
            return ort.error("lowtide: the input or the bias does not match the matrix");
        const MatmulInput input{reinterpret_cast<const float*>(x.data), reinterpret_cast<const float*>(bias.data),
                               x.size() / matrix->num_columns, input_id};
        float* out = nullptr;
        if (OrtStatus* error = output(context, x, x.num_dims - 1, matrix->num_rows, &out)) return error;
        if (input.num_rows == 0) return nullptr;
        OrtThreadGroup threads(ort, context, num_useful_threads(*graph, index, input.num_rows));
        const char* message = multiply_inputs(*graph, index, input, out, threads);
        return message == nullptr ? nullptr : ort.error(message);
    }
};

struct GatherNode : Node {
    using Node::Node;

    OrtStatus* compute(OrtKernelContext* context) const {
        OnnxMatmul* graph = find_onnx_matmul(handle);
        const RepackedMatrix* matrix = graph == nullptr ? nullptr : matrix_of(*graph, index);
        if (matrix == nullptr) return no_matmul();
        OrtTensor ids;
        if (OrtStatus* error = read_tensor(ort, context, 0, ids)) return error;
        float* out = nullptr;
        if (OrtStatus* error = output(context, ids, ids.num_dims, matrix->num_columns, &out)) return error;
        gather_rows(*graph, index, reinterpret_cast<const int64_t*>(ids.data), ids.size(), out);
        return nullptr;
    }
};

}  // namespace

OrtCustomOp matmul_operator() {
    OrtCustomOp op = make_operator<MatmulNode>();
    op.name = [](const OrtCustomOp*) { return "RepackedMatMul"; };
    op.num_inputs = [](const OrtCustomOp*) -> size_t { return 2; };
    op.input_type = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
    op.output_type = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
    return op;
}

OrtCustomOp gather_operator() {
    OrtCustomOp op = make_operator<GatherNode>();
    op.name = [](const OrtCustomOp*) { return "RepackedGather"; };
    op.num_inputs = [](const OrtCustomOp*) -> size_t { return 1; };
    op.input_type = [](const OrtCustomOp*, size_t) { return kOrtInt64; };
    op.output_type = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
    return op;
}

// The operators that a graph has in its quantised products' places: `lowtide::Product`, and `lowtide::Rows` for what is
// looked up in such a matrix. Both name a packed matrix (`onnx_products.h`) by `products` and `matrix`.
//
// Product's inputs are rows of float32 and, or not, a bias; `rows` is a number for the rows' name, another for every
// name. The input of Rows is the rows' numbers, of int64.

#include "onnx_products.h"
#include "ort_kernel.h"

namespace {

struct Node {
    Ort ort;
    int64_t owner = 0, place = 0;

    OrtStatus* read(const OrtKernelInfo* info) {
        if (OrtStatus* failure = ort.number(info, "products", &owner)) return failure;
        return ort.number(info, "matrix", &place);
    }

protected:
    OrtStatus* gone() const { return ort.failure("lowtide: nothing multiplies for this node"); }

    // The output, of the extents of `like` with another last one, or with one more.
    OrtStatus* output(OrtKernelContext* context, const OrtTensor& like, size_t num_kept, int64_t last, float** data) const {
        int64_t extents[OrtTensor::kMostExtents + 1];
        for (size_t i = 0; i < num_kept; ++i) extents[i] = like.extents[i];
        extents[num_kept] = last;
        OrtValue* out = nullptr;
        void* found = nullptr;
        OrtStatus* failure = ort.output(context, 0, extents, num_kept + 1, &out);
        if (failure == nullptr) failure = ort.data(out, &found);
        *data = static_cast<float*>(found);
        return failure;
    }
};

struct ProductNode : Node {
    int64_t name = 0;

    OrtStatus* read(const OrtKernelInfo* info) {
        if (OrtStatus* failure = Node::read(info)) return failure;
        return ort.number(info, "rows", &name);
    }

    OrtStatus* compute(OrtKernelContext* context) const {
        OnnxProducts* products = onnx_products_of(owner);
        const PackedMatrix* matrix = products == nullptr ? nullptr : matrix_of(*products, place);
        if (matrix == nullptr) return gone();
        OrtTensor x, bias;
        size_t count = 0;
        if (OrtStatus* failure = ort.num_inputs(context, &count)) return failure;
        if (OrtStatus* failure = read_tensor(ort, context, 0, x)) return failure;
        if (OrtStatus* failure = count > 1 ? read_tensor(ort, context, 1, bias) : nullptr) return failure;
        const bool is_bias = bias.data == nullptr || bias.size() == matrix->num_rows;
        if (x.num_extents == 0 || x.extents[x.num_extents - 1] != matrix->num_columns || !is_bias)
            return ort.failure("lowtide: rows are of another width than their matrix");
        const ProductRows rows{reinterpret_cast<const float*>(x.data), reinterpret_cast<const float*>(bias.data),
                               x.size() / matrix->num_columns, name};
        float* out = nullptr;
        if (OrtStatus* failure = output(context, x, x.num_extents - 1, matrix->num_rows, &out)) return failure;
        if (rows.num_rows == 0) return nullptr;
        OrtTeam team(ort, context, threads_that_pay(*products, place, rows.num_rows));
        const char* wrong = multiply_rows(*products, place, rows, out, team);
        return wrong == nullptr ? nullptr : ort.failure(wrong);
    }
};

struct RowsNode : Node {
    OrtStatus* compute(OrtKernelContext* context) const {
        OnnxProducts* products = onnx_products_of(owner);
        const PackedMatrix* matrix = products == nullptr ? nullptr : matrix_of(*products, place);
        if (matrix == nullptr) return gone();
        OrtTensor ids;
        if (OrtStatus* failure = read_tensor(ort, context, 0, ids)) return failure;
        float* out = nullptr;
        if (OrtStatus* failure = output(context, ids, ids.num_extents, matrix->num_columns, &out)) return failure;
        read_matrix_rows(*products, place, reinterpret_cast<const int64_t*>(ids.data), ids.size(), out);
        return nullptr;
    }
};

}  // namespace

OrtCustomOp product_operator() {
    OrtCustomOp op = operator_of_nodes<ProductNode>();
    op.name = [](const OrtCustomOp*) { return "Product"; };
    op.num_inputs = [](const OrtCustomOp*) -> size_t { return 2; };
    op.input_type = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
    op.output_type = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
    return op;
}

OrtCustomOp rows_operator() {
    OrtCustomOp op = operator_of_nodes<RowsNode>();
    op.name = [](const OrtCustomOp*) { return "Rows"; };
    op.num_inputs = [](const OrtCustomOp*) -> size_t { return 1; };
    op.input_type = [](const OrtCustomOp*, size_t) { return kOrtInt64; };
    op.output_type = [](const OrtCustomOp*, size_t) { return kOrtFloat; };
    return op;
}

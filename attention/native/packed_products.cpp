#include "packed_products.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "pack.h"
#include "unpack.h"

namespace {

constexpr int32_t kNoOperation = 0;  // GGML_OP_NONE: a tensor that is given

bool is_matrix(const GgmlTensor* t) { return t != nullptr && t->ne[2] == 1 && t->ne[3] == 1; }

// Rows of float32 whose values lie side by side.
bool is_rows(const GgmlTensor* t) {
    return is_matrix(t) && t->type == kGgmlTypeF32 && t->nb[0] == sizeof(float) && t->nb[1] % sizeof(float) == 0;
}

PackedMatrix matrix_of(const GgmlTensor* weights) {
    return {weights->type, int32_t(weights->ne[1]), int32_t(weights->ne[0]), static_cast<const uint8_t*>(weights->data)};
}

bool can_be_packed(const GgmlTensor* weights) {
    return is_matrix(weights) && weights->ne[1] * weights->nb[1] == lowtide_packed_bytes(weights->type, weights->ne[1], weights->ne[0]);
}

void leave_panels(const void* stream, const uint8_t* begin, const uint8_t* end) {
    static_cast<const WeightStream*>(stream)->give_back(reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(end));
}

}  // namespace

void PackedProducts::want(std::vector<CustomOp>& wanted) {
    for (int i = 0; i < 2 * Product::kUses; ++i) {
        operations_[i] = {this, i % Product::kUses, i / Product::kUses != 0, {}};
        wanted.push_back({multiply, &operations_[i], operations_[i].params});
    }
    rows_.owner = this;
    wanted.push_back({read_rows, &rows_, rows_.params});
}

bool PackedProducts::set(std::string_view names, int max_rows, int max_columns, int num_threads) {
    std::vector<char> text(names.begin(), names.end());
    std::unordered_set<std::string_view> found;
    for (size_t begin = 0; begin < names.size();) {
        const size_t end = std::min(names.find('\n', begin), names.size());
        found.emplace(text.data() + begin, end - begin);
        begin = end + 1;
    }
    if (kernels_ == nullptr || !product_.reserve(max_rows, max_columns, num_threads)) return false;
    names_.swap(found), text_.swap(text);
    return true;
}

bool PackedProducts::is_packed(const GgmlTensor* source) const {
    return source != nullptr && source->op == kNoOperation && names_.find(std::string_view(source->name)) != names_.end();
}

bool PackedProducts::is_known_product(const GgmlTensor* node) const {
    const GgmlTensor *weights = node->src[0], *rows = node->src[1];
    return can_be_packed(weights) && is_rows(rows) && is_rows(node) && rows->ne[0] == weights->ne[0] && node->ne[0] == weights->ne[1] &&
           node->ne[1] == rows->ne[1] && product_.has_room(int(rows->ne[1]), int(rows->ne[0]));
}

void PackedProducts::take(GgmlTensor* node, const OpNumbers& ops) {
    if (names_.empty()) return;
    // A graph comes back with the nodes that were taken.
    const bool were_rows = node->op == ops.custom && std::memcmp(node->op_params, rows_.params, sizeof rows_.params) == 0;
    const bool was_product = node->op == ops.custom && std::any_of(std::begin(operations_), std::end(operations_), [node](const Operation& o) {
        return std::memcmp(node->op_params, o.params, sizeof o.params) == 0;
    });
    const bool reads = std::any_of(std::begin(node->src), std::end(node->src), [this](const GgmlTensor* s) { return is_packed(s); });
    if (reads && (node->op == ops.product || was_product) && !is_packed(node->src[1]) && is_known_product(node)) {
        const bool by_floats = shape_of(Format(node->src[0]->type)).is_float();
        const bool is_next = quantised_ == node->src[1] && by_floats_ == by_floats && num_uses_ < Product::kUses;
        num_uses_ = is_next ? num_uses_ : 0;
        quantised_ = node->src[1], quantised_data_ = node->src[1]->data, by_floats_ = by_floats;
        const bool is_sliced = stream_.is_streamed_alone(node->src[0]);
        become(node, ops.custom, operations_[num_uses_++ + (is_sliced ? Product::kUses : 0)]);
        return;
    }
    // Where its values are made anew, those that were quantised are old; a graph, which may lie where one that is freed
    // lay, begins with rows that are read.
    if (node->data == quantised_data_ || node->op == ops.rows || were_rows) quantised_ = nullptr;
    if (!reads) return;
    const GgmlTensor *weights = node->src[0], *ids = node->src[1];
    const bool known_rows = (node->op == ops.rows || were_rows) && can_be_packed(weights) && is_matrix(ids) && ids->type == kGgmlTypeI32 &&
                            ids->nb[0] == sizeof(int32_t) && ids->ne[1] == 1 && is_rows(node) && node->ne[0] == weights->ne[0] &&
                            node->ne[1] == ids->ne[0];
    if (known_rows)
        become(node, ops.custom, rows_);
    else
        ++num_refused_;
}

void PackedProducts::become(GgmlTensor* node, int32_t custom, const Operation& operation) {
    node->op = custom;
    std::memcpy(node->op_params, operation.params, sizeof operation.params);
    ++num_taken_;
}

void PackedProducts::multiply(GgmlTensor* node, int thread, int num_threads, void* user_data) {
    const auto& operation = *static_cast<const Operation*>(user_data);
    PackedProducts& self = *operation.owner;
    const GgmlTensor* rows = node->src[1];
    const PanelReader reader{leave_panels, &self.stream_};
    self.product_.run(matrix_of(node->src[0]), static_cast<const float*>(rows->data), rows->nb[1] / sizeof(float), int(rows->ne[1]),
                      operation.use, static_cast<float*>(node->data), node->nb[1] / sizeof(float), *self.kernels_,
                      operation.is_sliced ? &reader : nullptr, thread, num_threads);
}

void PackedProducts::read_rows(GgmlTensor* node, int thread, int num_threads, void*) {
    const PackedMatrix matrix = matrix_of(node->src[0]);
    const auto* ids = static_cast<const int32_t*>(node->src[1]->data);
    for (int64_t i = thread; i < node->ne[1]; i += num_threads) {
        auto* out = reinterpret_cast<float*>(static_cast<char*>(node->data) + i * node->nb[1]);
        if (ids[i] >= 0 && ids[i] < matrix.num_rows)
            unpack_row(matrix, ids[i], out);
        else
            std::fill(out, out + node->ne[0], 0.0f);
    }
}

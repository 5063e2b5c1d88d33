// Replaces matmuls and row lookups in llama.cpp's graph.

#include "llama/repacked_matmul.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "matmul/repack.h"

namespace {

constexpr int32_t kNoOperation = 0;  // GGML_OP_NONE: an input of the graph

bool is_matrix(const GgmlTensor* t) { return t != nullptr && t->ne[2] == 1 && t->ne[3] == 1; }

// Contiguous rows of float32.
bool is_rows(const GgmlTensor* t) {
    return is_matrix(t) && t->type == kGgmlTypeF32 && t->nb[0] == sizeof(float) && t->nb[1] % sizeof(float) == 0;
}

RepackedMatrix matrix_of(const GgmlTensor* weights) {
    return {weights->type, int32_t(weights->ne[1]), int32_t(weights->ne[0]), static_cast<const uint8_t*>(weights->data)};
}

bool has_repacked_size(const GgmlTensor* weights) {
    return is_matrix(weights) && weights->ne[1] * weights->nb[1] == lowtide_repacked_bytes(weights->type, weights->ne[1], weights->ne[0]);
}

void release_tiles(const void* stream, const uint8_t* begin, const uint8_t* end) {
    static_cast<const WeightStream*>(stream)->release_pages(reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(end));
}

}  // namespace

void RepackedMatmul::list_ops(std::vector<CustomOp>& ops) {
    for (int i = 0; i < 2 * Matmul::kMaxReuses; ++i) {
        operations_[i] = {this, i % Matmul::kMaxReuses, i / Matmul::kMaxReuses != 0, {}};
        ops.push_back({multiply, &operations_[i], operations_[i].params});
    }
    get_rows_.owner = this;
    ops.push_back({get_rows, &get_rows_, get_rows_.params});
}

bool RepackedMatmul::set(std::string_view names, int max_rows, int max_columns, int num_threads) {
    std::vector<char> text(names.begin(), names.end());
    std::unordered_set<std::string_view> found;
    for (size_t begin = 0; begin < names.size();) {
        const size_t end = std::min(names.find('\n', begin), names.size());
        found.emplace(text.data() + begin, end - begin);
        begin = end + 1;
    }
    team_.settle();
    matmul_.release();
    if (kernels_ == nullptr || !matmul_.reserve(max_rows, max_columns, num_threads)) return false;
    team_.reserve(num_threads, Matmul::aside_bytes(max_rows, max_columns));
    names_.swap(found), text_.swap(text);
    return true;
}

bool RepackedMatmul::is_repacked(const GgmlTensor* source) const {
    return source != nullptr && source->op == kNoOperation && names_.find(std::string_view(source->name)) != names_.end();
}

bool RepackedMatmul::is_known_matmul(const GgmlTensor* node) const {
    const GgmlTensor *weights = node->src[0], *rows = node->src[1];
    return has_repacked_size(weights) && is_rows(rows) && is_rows(node) && rows->ne[0] == weights->ne[0] && node->ne[0] == weights->ne[1] &&
           node->ne[1] == rows->ne[1] && matmul_.has_room(int(rows->ne[1]), int(rows->ne[0]));
}

void RepackedMatmul::replace(GgmlTensor* node, const GgmlOps& ops) {
    if (names_.empty()) return;
    // A graph is computed repeatedly, with the nodes that were replaced.
    const bool was_get_rows = node->op == ops.custom && std::memcmp(node->op_params, get_rows_.params, sizeof get_rows_.params) == 0;
    const bool was_matmul =
        node->op == ops.custom && std::any_of(std::begin(operations_), std::end(operations_), [node](const Operation& o) {
            return std::memcmp(node->op_params, o.params, sizeof o.params) == 0;
        });
    const bool reads_repacked =
        std::any_of(std::begin(node->src), std::end(node->src), [this](const GgmlTensor* s) { return is_repacked(s); });
    if (reads_repacked && (node->op == ops.mul_mat || was_matmul) && !is_repacked(node->src[1]) && is_known_matmul(node)) {
        const bool is_float = shape_of(Format(node->src[0]->type)).is_float();
        const bool is_next = quantised_ == node->src[1] && is_float_ == is_float && num_reuses_ < Matmul::kMaxReuses;
        num_reuses_ = is_next ? num_reuses_ : 0;
        quantised_ = node->src[1], quantised_data_ = node->src[1]->data, is_float_ = is_float;
        const bool is_streamed = stream_.is_streamed_alone(node->src[0]);
        turn_into(node, ops.custom, operations_[num_reuses_++ + (is_streamed ? Matmul::kMaxReuses : 0)]);
        return;
    }
    // If the node computes new values, the quantised ones are stale. A new graph may have the addresses of a freed
    // one, but it begins with GET_ROWS.
    if (node->data == quantised_data_ || node->op == ops.get_rows || was_get_rows) quantised_ = nullptr;
    if (!reads_repacked) return;
    const GgmlTensor *weights = node->src[0], *ids = node->src[1];
    const bool is_known_get_rows = (node->op == ops.get_rows || was_get_rows) && has_repacked_size(weights) && is_matrix(ids) &&
                                   ids->type == kGgmlTypeI32 && ids->nb[0] == sizeof(int32_t) && ids->ne[1] == 1 && is_rows(node) &&
                                   node->ne[0] == weights->ne[0] && node->ne[1] == ids->ne[0];
    if (is_known_get_rows)
        turn_into(node, ops.custom, get_rows_);
    else
        ++num_refused_;
}

void RepackedMatmul::turn_into(GgmlTensor* node, int32_t custom, const Operation& operation) {
    node->op = custom;
    std::memcpy(node->op_params, operation.params, sizeof operation.params);
    ++num_replaced_;
}

void RepackedMatmul::multiply(GgmlTensor* node, int thread, int num_threads, void* user_data) {
    const auto& operation = *static_cast<const Operation*>(user_data);
    RepackedMatmul& self = *operation.owner;
    const GgmlTensor* rows = node->src[1];
    const TileObserver observer{release_tiles, &self.stream_};
    const auto run = [&](auto&&... by) {
        self.matmul_.run(matrix_of(node->src[0]), static_cast<const float*>(rows->data), rows->nb[1] / sizeof(float),
                         int(rows->ne[1]), operation.reuse, static_cast<float*>(node->data), node->nb[1] / sizeof(float),
                         *self.kernels_, operation.is_streamed ? &observer : nullptr, by...);
    };
    if (num_threads == 1)
        run(self.team_);
    else
        run(thread, num_threads);
}

void RepackedMatmul::get_rows(GgmlTensor* node, int thread, int num_threads, void*) {
    const RepackedMatrix matrix = matrix_of(node->src[0]);
    const auto* ids = static_cast<const int32_t*>(node->src[1]->data);
    for (int64_t i = thread; i < node->ne[1]; i += num_threads) {
        auto* out = reinterpret_cast<float*>(static_cast<char*>(node->data) + i * node->nb[1]);
        if (ids[i] >= 0 && ids[i] < matrix.num_rows)
            dequantise_row(matrix, ids[i], out);
        else
            std::fill(out, out + node->ne[0], 0.0f);
    }
}

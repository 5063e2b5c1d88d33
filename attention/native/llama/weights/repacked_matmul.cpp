// Replaces matmuls and row lookups in llama.cpp's graph.

#include "llama/weights/repacked_matmul.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "matmul/repack.h"

namespace {

constexpr int32_t kNoOperation = 0;  // GGML_OP_NONE: an input of the graph, or a node that is empty

// The last word of a custom operation's `op_params`, which ggml leaves alone, has the index of the node's group.
constexpr int kGroupWord = 15;

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
    for (bool is_streamed : {false, true}) {
        Operation& operation = operations_[is_streamed];
        operation = {this, is_streamed, {}};
        ops.push_back({multiply, &operation, operation.params});
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
    known_.clear();
    return true;
}

// Weights outlive every graph, so their addresses are looked up instead of their names. Other inputs may come and go.
bool RepackedMatmul::is_repacked(const GgmlTensor* source) {
    constexpr size_t kMaxKnown = 1 << 14;
    if (source == nullptr || source->op != kNoOperation || source->view_src != nullptr) return false;
    if (const auto found = known_.find(source); found != known_.end()) return found->second;
    if (known_.size() >= kMaxKnown) known_.clear();
    return known_[source] = names_.find(std::string_view(source->name)) != names_.end();
}

bool RepackedMatmul::is_known_matmul(const GgmlTensor* node) const {
    const GgmlTensor *weights = node->src[0], *rows = node->src[1];
    return has_repacked_size(weights) && is_rows(rows) && is_rows(node) && rows->ne[0] == weights->ne[0] && node->ne[0] == weights->ne[1] &&
           node->ne[1] == rows->ne[1] && matmul_.has_room(int(rows->ne[1]), int(rows->ne[0]));
}

bool RepackedMatmul::replaces_used(const Extent& result) const {
    const Group& group = groups_.back();
    return std::any_of(touched_.begin(), touched_.end(), [&](const Extent& e) { return e.overlaps(result); }) ||
           std::any_of(group.nodes, group.nodes + group.count, [&](const GgmlTensor* n) { return extent_of(n).overlaps(result); });
}

// Whether the node may be computed where the last group is, if its result replaces nothing that is in use there.
bool RepackedMatmul::can_join(const GgmlTensor* node) const {
    if (!is_open_ || groups_.back().count == Matmul::kMaxTargets) return false;
    const GgmlTensor* first = groups_.back().nodes[0];
    const auto is_float = [](const GgmlTensor* n) { return shape_of(Format(n->src[0]->type)).is_float(); };
    return first->src[1] == node->src[1] && is_float(first) == is_float(node) && !stream_.is_streamed_alone(node->src[0]);
}

void RepackedMatmul::replace_matmul(GgmlTensor* node, const GgmlOps& ops) {
    const GgmlTensor* weights = node->src[0];
    moved_.add_again(node);
    if (can_join(node) && (!replaces_used(extent_of(node)) || moved_.move(node))) {
        node->op = kNoOperation;
        groups_.back().nodes[groups_.back().count++] = node;
        ++num_replaced_;
    } else {
        const bool is_streamed = stream_.is_streamed_alone(weights);
        groups_.push_back({{node}, 1, 0});
        ++num_steps_;
        touched_.clear();
        moved_.free_used();
        is_open_ = !is_streamed;
        turn_into(node, ops.custom, operations_[is_streamed]);
        node->op_params[kGroupWord] = int32_t(groups_.size() - 1);
    }
    groups_.back().next_read = reads_.add(weights->data, size_t(weights->ne[1]) * weights->nb[1]);
}

void RepackedMatmul::replace(GgmlTensor* node, const GgmlOps& ops, bool begins_part) {
    if (names_.empty()) return;
    if (begins_part) {
        groups_.clear();
        is_open_ = false;
    }
    moved_.follow(node);
    // A graph is computed repeatedly, with the nodes that were replaced.
    const auto is_ours = [&](const Operation& o) {
        return node->op == ops.custom && std::memcmp(node->op_params, o.params, sizeof(int32_t) * kGroupWord) == 0;
    };
    const bool was_get_rows = is_ours(get_rows_);
    const bool reads_repacked = is_repacked(node->src[0]) || is_repacked(node->src[1]);
    const bool is_matmul = node->op == ops.mul_mat || (node->op == kNoOperation && node->view_src == nullptr) ||
                           is_ours(operations_[0]) || is_ours(operations_[1]);
    if (reads_repacked && is_matmul && !is_repacked(node->src[1]) && is_known_matmul(node)) {
        replace_matmul(node, ops);
        return;
    }
    if (is_open_) {
        touched_.push_back(extent_of(node));
        for (const GgmlTensor* source : node->src)
            if (source != nullptr) touched_.push_back(extent_of(source));
    }
    // A new graph may have the addresses of a freed one, but it begins with GET_ROWS.
    if (node->op == ops.get_rows || was_get_rows) {
        is_open_ = false;
        if (node->src[0]->op == kNoOperation) moved_.clear();  // the embedding
    }
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
    const Group& group = self.groups_[node->op_params[kGroupWord]];
    const GgmlTensor* rows = node->src[1];
    MatmulTarget targets[Matmul::kMaxTargets];
    for (int i = 0; i < group.count; ++i) {
        const GgmlTensor* each = group.nodes[i];
        targets[i] = {matrix_of(each->src[0]), static_cast<float*>(each->data), each->nb[1] / sizeof(float)};
    }
    const TileObserver observer{release_tiles, &self.stream_};
    const auto run = [&](auto&&... by) {
        self.matmul_.run(targets, group.count, static_cast<const float*>(rows->data), rows->nb[1] / sizeof(float), int(rows->ne[1]),
                         *self.kernels_, operation.is_streamed ? &observer : nullptr, by...);
    };
    if (num_threads == 1) {
        self.reads_.announce(group.next_read, self.team_);
        run(self.team_);
    } else {
        self.reads_.note_computed();
        run(thread, num_threads);
    }
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

#include "layer_cells.h"

#include <cstring>

void LayerCells::set(const AttentionProblem& p) {
    keys_ = {const_cast<char*>(p.k), p.k_key_stride, p.k_head_stride, stored_bytes(p.k_type, p.key_size)};
    values_ = {const_cast<char*>(p.v), p.v_key_stride, p.v_head_stride, stored_bytes(p.v_type, p.value_size)};
    num_heads_ = p.num_kv_heads, num_cells_ = p.num_keys;
}

bool LayerCells::copy(int from, int to) const {
    if (from < 0 || to < 0 || from >= num_cells_ || to >= num_cells_) return false;
    if (from == to) return true;
    keys_.copy(from, to, num_heads_);
    values_.copy(from, to, num_heads_);
    return true;
}

void LayerCells::Rows::copy(int from, int to, int num_heads) const {
    for (int head = 0; head < num_heads; ++head) {
        char* row = first + head * head_stride;
        std::memcpy(row + to * cell_stride, row + from * cell_stride, num_bytes);
    }
}

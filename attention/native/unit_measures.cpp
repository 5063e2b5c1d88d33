#include "unit_measures.h"

#include <algorithm>

void UnitMeasures::start(int num_layers, int num_kv_heads, int key_size) {
    num_kv_heads_ = num_kv_heads;
    units_.assign(size_t(num_layers) * num_kv_heads, {});
    for (Unit& unit : units_) unit.squares.assign(key_size, 0.0);
    is_on_ = true;
}

void UnitMeasures::reserve(const AttentionProblem& p) {
    const size_t size = is_on_ ? size_t(p.num_rows) * p.num_heads * p.value_size : 0;
    if (results_.size() < size) results_.resize(size);
}

void UnitMeasures::take_results(AttentionProblem& p) {
    p.out = reinterpret_cast<char*>(results_.data());
    p.out_head_stride = sizeof(float) * p.value_size, p.out_row_stride = p.out_head_stride * p.num_heads;
}

void UnitMeasures::leave_out(int layer) {
    for (int head = 0; head < num_kv_heads_; ++head) units_[layer * num_kv_heads_ + head].is_left_out = true;
}

void UnitMeasures::compare(const AttentionProblem& p, int layer, int first_compared) {
    const int group = p.group_size();
    for (int row = 0; row < p.num_rows; ++row)
        for (int kv_head = 0; kv_head < num_kv_heads_; ++kv_head) {
            Unit& unit = units_[layer * num_kv_heads_ + kv_head];
            double wrong = 0.0, whole = 0.0;
            for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                const auto* q = reinterpret_cast<const float*>(p.q + row * p.q_row_stride + head * p.q_head_stride);
                const auto* exact = reinterpret_cast<const float*>(p.out + row * p.out_row_stride + head * p.out_head_stride);
                const float* found = results_.data() + (size_t(row) * p.num_heads + head) * p.value_size;
                for (int d = 0; d < p.key_size; ++d) unit.squares[d] += double(q[d]) * q[d] / group;
                for (int d = 0; d < p.value_size; ++d) {
                    const double apart = double(exact[d]) - found[d];
                    wrong += apart * apart, whole += double(exact[d]) * exact[d];
                }
            }
            ++unit.num_queries;
            if (row < first_compared) continue;
            unit.error += wrong / std::max(whole, 1e-30), ++unit.num_compared;
        }
}

void UnitMeasures::read(float* errors, float* squares) const {
    for (const Unit& unit : units_) {
        *errors++ = unit.is_left_out ? -1.0f : float(unit.error / double(std::max<int64_t>(unit.num_compared, 1)));
        for (const double square : unit.squares) *squares++ = float(square / double(std::max<int64_t>(unit.num_queries, 1)));
    }
}

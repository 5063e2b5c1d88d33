#pragma once

#include <cstdint>
#include <vector>

#include "attention_problem.h"

// How far an approximation's own results are from dense attention, of each layer and KV head (a unit), and how
// large the channels of its queries are.
class UnitMeasures {
public:
    // Forgets what was measured before; throws std::bad_alloc.
    void start(int num_layers, int num_kv_heads, int key_size);
    void stop() { is_on_ = false; }
    bool is_on() const { return is_on_; }

    // Room for the approximation's results of a pass, where it is measured; throws std::bad_alloc.
    void reserve(const AttentionProblem& problem);

    // Has the approximation's results go to that room.
    void take_results(AttentionProblem& problem);

    // Holds them against `problem.out`, but for the rows before `first_compared`. By one thread.
    void compare(const AttentionProblem& problem, int layer, int first_compared);

    // A pass over the layer was not approximated.
    void leave_out(int layer);

    // Of each unit, the relative squared errors of the rows compared, -1 where a pass was left out, and the squares
    // of all rows' queries by channel, as means.
    void read(float* errors, float* squares) const;

private:
    struct Unit {
        double error = 0.0;
        bool is_left_out = false;
        int64_t num_compared = 0, num_queries = 0;
        std::vector<double> squares;
    };

    bool is_on_ = false;
    int num_kv_heads_ = 0;
    std::vector<Unit> units_;
    std::vector<float> results_;  // (rows, heads, value_size)
};

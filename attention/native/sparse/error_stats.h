#pragma once

// The errors of an approximation, which calibration of `delta` uses.

#include <cstdint>
#include <vector>

#include "attention/problem.h"

// The error of an approximation against dense attention, per layer and KV head, and the mean squares of the query
// channels. Calibration of `delta` uses both.
class HeadErrorStats {
public:
    // Drops earlier measurements. Throws std::bad_alloc.
    void start(int num_layers, int num_kv_heads, int key_dim);
    void stop() { is_on_ = false; }
    bool is_on() const { return is_on_; }

    // Reserves room for the approximate results of a pass, if it is measured. Throws std::bad_alloc.
    void reserve(const AttentionProblem& problem);

    // Redirects the approximation's output to that room.
    void redirect_output(AttentionProblem& problem);

    // Compares it with `problem.out` for the tokens from `first_compared` on. Called by one thread.
    void compare(const AttentionProblem& problem, int layer, int first_compared);

    // Notes that a pass over the layer was not approximated.
    void skip(int layer);

    // For each layer and KV head: the mean relative squared error of the compared tokens, -1 if a pass was skipped;
    // and the mean squares of all queries' channels.
    void read(float* errors, float* query_squares) const;

private:
    struct HeadStats {
        double error = 0.0;
        bool is_skipped = false;
        int64_t num_compared = 0, num_queries = 0;
        std::vector<double> query_squares;
    };

    bool is_on_ = false;
    int num_kv_heads_ = 0;
    std::vector<HeadStats> heads_;
    std::vector<float> approximate_;  // (tokens, heads, value_dim)
};

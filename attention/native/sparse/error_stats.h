#pragma once

// The errors of an approximation, which calibration of `delta` uses, and the base of policies that measure theirs.

#include <cstdint>
#include <vector>

#include "attention/problem.h"
#include "sparse/policy.h"

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

// A policy that can measure its errors: passes then return dense attention, and `measure` compares the policy's result
// with it.
class MeasuredPolicy : public SparsePolicy {
public:
    using SparsePolicy::SparsePolicy;

    void start_pass(const PassOptions& options) override {
        is_on_ = options.sparse, refine_ = options.refine;
        error_stats_.stop();
    }

    // Starts to measure errors until the next `start_pass`. Drops earlier measurements. Throws std::bad_alloc.
    void start_error_stats() {
        error_stats_.start(num_layers_, num_kv_heads_, key_dim_);
        is_on_ = true;
    }
    bool is_measuring() const override { return error_stats_.is_on(); }

    // As HeadErrorStats::read. The compared tokens are those whose keys are approximated.
    void read_error_stats(float* errors, float* query_squares) const { error_stats_.read(errors, query_squares); }

protected:
    // Whether scores above this share of a head's weight are refined; not while errors are measured.
    bool refines(float threshold) const { return refine_ && threshold > 0.0f && !error_stats_.is_on(); }

    HeadErrorStats error_stats_;
    int num_layers_ = 0, num_kv_heads_ = 0, key_dim_ = 0;  // of the model
    bool is_on_ = false, refine_ = false;
};

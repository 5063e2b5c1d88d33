#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "attention_problem.h"
#include "barrier.h"
#include "key_states.h"
#include "opened_states.h"
#include "team.h"
#include "unit_measures.h"

// What every layer's states are made by. Python fills it.
struct StatesRule {
    int32_t window;     // of each row's last keys so many, its own among them, are seen as they are
    int32_t num_first;  // the first keys of all are sent whole
    int32_t block;      // so many channels are sent together: 1, 8 or 16
    float opens;        // keys whose states get more than such a share of a head's weight are opened in decoding; 0: none
};

// What scores cost, summed over passes, for each pass's last row and all KV heads. A channel of a key is multiplied
// once, whatever the number of its query heads.
struct ScoreCounts {
    int64_t channels_held;        // of all keys that are seen
    int64_t channels_behind;      // of those that are seen as states
    int64_t channels_sent;        // of these, what was sent
    int64_t channels_multiplied;  // of all: what was sent, and the keys beside
    int64_t key_bytes_held;       // of all keys, in the cache
    int64_t key_bytes_read;       // of states with the groups that keys are in, and of the other keys in the cache
};

// Attention over states: behind a window a query does not see a key but a state that stands for it (KeyStates), and
// blocks of channels that keys of a page see alike cost one multiplication and one read. Values are seen as they are.
// Rows see a beginning of the cache each, one cell more than the row before; what is otherwise is not taken.
class StateAttend {
public:
    static constexpr int kNotTaken = -1;

    // Of each layer and KV head, (num_layers, num_kv_heads): the threshold, and the share of a page's blocks that is
    // sent at the most, 1 where the threshold alone says; and the scales of its channels, (..., key_size). A layer with a
    // threshold below 0 is not taken. Between passes only. False, and nothing changes, where blocks cannot be of
    // that size; throws std::bad_alloc.
    bool set_units(const StatesRule& rule, const float* thresholds, const float* shares, const float* scales, int num_layers,
                   int num_kv_heads, int key_size);

    // Whether passes from now on are taken, and whether they open states, as the rule has it.
    void start_pass(bool taken, bool opens = false) { is_on_ = taken, opens_ = opens, measures_.stop(); }

    // As for DeltaAttend.
    void start_measuring();
    bool is_measuring() const { return measures_.is_on(); }
    void measure(const AttentionProblem& problem, int layer);
    void read_measures(float* errors, float* squares) const { measures_.read(errors, squares); }

    // Of each unit, which share of the channels of all its states was sent.
    void read_shares(float* shares) const;

    // Forgets the cells from `num_cells` on, in every layer: they are other ones now.
    void cut(int num_cells);

    bool reserve(const AttentionProblem& problem, int layer, int stream, int num_threads);

    // Returns the number of keys that the last row attended to; kNotTaken where nothing was done but to forget what the
    // pass writes. The second form is called by each of `num_threads` threads.
    int run(const AttentionProblem& problem, int layer, int stream, const KernelSet& kernels, Team& team);
    int run(const AttentionProblem& problem, int layer, int stream, const KernelSet& kernels, int thread, int num_threads);

    const ScoreCounts& counts() const { return counts_; }
    size_t scratch_bytes() const;

private:
    struct Layer {
        bool is_taken = true;
        std::vector<std::vector<KeyStates>> streams;  // of heads
    };

    bool knows(const AttentionProblem& problem, int layer) const;
    bool takes(const AttentionProblem& problem, int layer, int stream);
    StateRule rule_of(int layer, int kv_head) const;
    bool is_opening() const { return opens_ && rule_.opens > 0.0f && !measures_.is_on(); }
    void ready(const AttentionProblem& problem, const std::vector<KeyStates>& heads);
    void start_rows(const AttentionProblem& problem, int first_row, int num_rows);
    void open_rows(const KernelSet& kernels, Team& team);
    void count(const AttentionProblem& problem, const std::vector<KeyStates>& heads);
    void count_opened(const AttentionProblem& problem);

    Attend attend_;
    OpenedStates opened_;
    Barrier barrier_;
    StatesRule rule_{};
    std::vector<Layer> layers_;
    std::vector<float> thresholds_, shares_, scales_;
    std::vector<StateStore> stores_;
    StatesOfRows states_{};
    AttentionProblem own_{};
    UnitMeasures measures_;
    ScoreCounts counts_{};
    int num_kv_heads_ = 0, key_size_ = 0;
    std::atomic<int> num_opened_{0};  // by the last row that was attended to
    int first_ = 0;                   // the cell of a pass's first row
    bool is_on_ = false, opens_ = false, taken_ = false;
};

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "attention_problem.h"
#include "barrier.h"
#include "key_groups.h"
#include "opened_groups.h"
#include "team.h"
#include "unit_measures.h"

// What every layer's groups are made by. Python fills it.
struct DeltaRule {
    int32_t window;     // of each row's last keys so many, its own among them, are never grouped
    int32_t num_fixed;  // nor are so many of the first
    float opens;        // groups that get more than such a share of a head's weight are opened in decoding; 0: none
    int32_t replaces;   // whether a layer's own cells go back to the system once groups stand for them
};

// Attention over groups: behind a window, keys that are like one another share one score and one value
// (KeyGroups), so that the others cost neither a multiplication nor a read. Rows see a beginning of the cache
// each, one cell more than the row before; what is otherwise is not taken.
class DeltaAttend {
public:
    static constexpr int kNotTaken = -1;

    // Of each layer and KV head, (num_layers, num_kv_heads): how many groups a page has, kPageKeys where it is
    // not grouped, the lifts of groups (GroupRule) where scores are not scaled, and the scales of its channels, (...,
    // key_size). A layer without a head that is grouped is not taken. Between passes only. False, and nothing changes,
    // where a page cannot have so many groups; throws std::bad_alloc.
    bool set_units(const DeltaRule& rule, const uint8_t* num_groups, const float* lifts, const float* scales, int num_layers,
                   int num_kv_heads, int key_size);

    // Whether passes from now on are taken, and whether they open groups, as the rule has it.
    void start_pass(bool grouped, bool opens = false) { grouped_ = grouped, opens_ = opens, measures_.stop(); }

    // Has passes be measured: what groups would make of them is held against dense attention, which they get;
    // what was measured before is forgotten.
    void start_measuring();
    bool is_measuring() const { return measures_.is_on(); }

    // Holds a pass that was measured against `problem.out`. By one thread.
    void measure(const AttentionProblem& problem, int layer);

    // Of each unit, the relative squared errors of rows that have groups, -1 where a pass was not taken, and the
    // squares of all rows' queries by channel, as means.
    void read_measures(float* errors, float* squares) const { measures_.read(errors, squares); }

    // Forgets the cells from `num_cells` on, in every layer: they are other ones now.
    void cut(int num_cells);

    // Groups everything anew in passes to come.
    void forget();

    // Fewer cells than these cannot be gone back to, but for none: what lay there was given back.
    int least_cells() const;

    // Whether a pass has wanted cells that were given back: what it computed means nothing.
    bool has_lost() const { return has_lost_; }

    // As for Attend.
    bool reserve(const AttentionProblem& problem, int layer, int stream, int num_threads);

    // Returns the number of keys and groups that the last row attended to, a mean of the heads; kNotTaken where
    // nothing was done but to forget what the pass writes. The second form is called by each of `num_threads` threads.
    int run(const AttentionProblem& problem, int layer, int stream, const KernelSet& kernels, Team& team);
    int run(const AttentionProblem& problem, int layer, int stream, const KernelSet& kernels, int thread, int num_threads);

    size_t scratch_bytes() const;

private:
    struct Layer {
        bool is_grouped = false;
        int num_given_back = 0;
        std::vector<std::vector<KeyGroups>> streams;  // of heads
    };

    bool is_opening() const { return opens_ && rule_.opens > 0.0f && rule_.replaces == 0 && !measures_.is_on(); }
    bool takes(const AttentionProblem& problem, int layer, int stream);
    bool knows(const AttentionProblem& problem, int layer) const;
    GroupRule rule_of(const AttentionProblem& problem, int layer, int kv_head) const;
    int num_pages_before(int position) const;
    bool holds(const Layer& layer, int stream, int first) const;
    void give_back(const AttentionProblem& problem, Layer& layer, int stream, int first);
    void open(const AttentionProblem& problem, const std::vector<KeyGroups>& heads, int first_row, int num_rows, const KernelSet& kernels,
              int thread, int num_threads);
    void ready(const AttentionProblem& problem, const KeyGroups& groups, int kv_head, int first_row, int num_rows);

    Attend attend_;
    OpenedGroups opened_;
    Barrier barrier_;
    DeltaRule rule_{};
    std::vector<Layer> layers_;
    std::vector<uint8_t> num_groups_;
    std::vector<float> lifts_, scales_;
    std::vector<uint16_t> mask_;
    AttentionProblem of_head_{};
    UnitMeasures measures_;
    std::atomic<int> num_opened_{0};  // by the last row
    int num_kv_heads_ = 0, key_size_ = 0, first_ = 0;  // `first_` is the cell of a pass's first row
    bool grouped_ = false, opens_ = false, taken_ = false, has_lost_ = false;
};

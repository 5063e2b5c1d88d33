#pragma once

// What the native nodes of a forward pass read from memory, in the order in which they are computed.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <vector>

#include "team.h"

// Helpers of the team that wait for work prefetch what the nodes behind the current one read. The scheduler shows the
// nodes of a part of the graph before it computes that part.
class PassReads {
public:
    // Before a node is shown. Returns whether nodes were computed since the last one: then a new part begins.
    bool begins_part() {
        if (!has_computed_.exchange(false, std::memory_order_relaxed)) return false;
        spans_.clear();
        return true;
    }

    // Adds what the next node reads. Returns its place, for `announce`.
    int add(const void* data, size_t num_bytes) {
        if (spans_.size() >= kMaxSpans) return int(spans_.size());
        spans_.push_back({static_cast<const char*>(data), num_bytes});
        return int(spans_.size());
    }

    // Called when a node is computed; `next` is the place that the last `add` for it returned. Behind the last node
    // come the first ones, of the next pass.
    void announce(int next, Team& team) {
        has_computed_.store(true, std::memory_order_relaxed);
        Team::Span upcoming[Team::kMaxUpcoming] = {};
        const int count = std::min(int(spans_.size()), Team::kMaxUpcoming);
        for (int i = 0; i < count; ++i) upcoming[i] = spans_[(next + i) % spans_.size()];
        team.set_upcoming(upcoming, count);
    }

    // Called by nodes that ggml's own threads compute.
    void note_computed() { has_computed_.store(true, std::memory_order_relaxed); }

private:
    static constexpr size_t kMaxSpans = 1 << 14;

    std::vector<Team::Span> spans_;
    std::atomic<bool> has_computed_{false};
};

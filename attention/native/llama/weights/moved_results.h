#pragma once

// Results of nodes that are computed earlier than llama.cpp's graph says, where their memory is still another node's.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "llama/ggml_abi.h"

// A stretch of memory.
struct Extent {
    const char *begin, *end;
    bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }
};

// No dimension of a tensor reaches further than the largest of its strides times its size.
inline Extent extent_of(const GgmlTensor* t) {
    size_t num_bytes = 0;
    for (int i = 1; i < 4; ++i) num_bytes = std::max(num_bytes, size_t(t->ne[i]) * t->nb[i]);
    const auto* data = static_cast<const char*>(t->data);
    return {data, data + num_bytes};
}

// Memory of our own for such results. A graph keeps the addresses when it is computed again. Once
// ggml's memory for a result gets another one, nothing reads the result any more: its place is free for nodes that are
// computed later than that.
class MovedResults {
public:
    // Called for every node in the graph's order, before all else: the views of what was moved move, too.
    void follow(GgmlTensor* node) {
        if (node->view_src != nullptr) {
            if (is_here(node->view_src)) node->data = static_cast<char*>(node->view_src->data) + node->view_offs;
            return;
        }
        if (places_.empty()) return;
        const Extent written = extent_of(node);
        for (Place& p : places_) p.is_used |= p.from.overlaps(written);
    }

    // What is moved from now on is computed behind the nodes so far.
    void free_used() {
        places_.erase(std::remove_if(places_.begin(), places_.end(), [](const Place& p) { return p.is_used; }), places_.end());
    }

    // Moves the result of a matmul that becomes an empty node, if there is room.
    bool move(GgmlTensor* node) {
        if (is_here(node)) return true;
        const Extent from = extent_of(node);
        const size_t num_bytes = (size_t(from.end - from.begin) + kAlignment - 1) / kAlignment * kAlignment;
        const char* begin = memory_;
        for (bool is_free = false; !is_free;) {  // the first gap that is large enough
            is_free = true;
            for (const Place& p : places_)
                if (p.at.overlaps({begin, begin + num_bytes})) begin = p.at.end, is_free = false;
        }
        if (begin + num_bytes > memory_ + kBytes) return false;
        node->data = const_cast<char*>(begin);
        std::memcpy(&node->op_params[kFromWord], &from.begin, sizeof from.begin);
        places_.push_back({{begin, begin + num_bytes}, from, false});
        return true;
    }

    // A result that was moved when the graph was computed before takes its place again.
    void add_again(const GgmlTensor* node) {
        if (!is_here(node)) return;
        Extent at = extent_of(node), from{};
        std::memcpy(&from.begin, &node->op_params[kFromWord], sizeof from.begin);
        from.end = from.begin + (at.end - at.begin);
        at.end = at.begin + (size_t(at.end - at.begin) + kAlignment - 1) / kAlignment * kAlignment;
        places_.push_back({at, from, false});
    }

    // Before a pass.
    void clear() { places_.clear(); }

    size_t num_bytes() const { return kBytes; }

private:
    struct Place {
        Extent at, from;
        bool is_used;  // by all that read it
    };

    static constexpr size_t kBytes = 32 << 10, kAlignment = 64;
    static constexpr int kFromWord = 8;  // where `op_params` has ggml's address; a matmul and a custom operation use less

    bool is_here(const GgmlTensor* t) const {
        const auto* data = static_cast<const char*>(t->data);
        return data >= memory_ && data < memory_ + kBytes;
    }

    std::vector<Place> places_;
    alignas(kAlignment) char memory_[kBytes];
};

#pragma once

// Drafts that need no model: they propose tokens from what a text, or a conversation, said before.

#include <cstddef>
#include <cstdint>
#include <vector>

constexpr int32_t kText = -1;  // the parent of tokens that follow the text itself
constexpr int kMaxSiblings = 2;

// Draft tokens as a tree: row i follows row `parents[i]`, which comes before it, or kText. Of siblings, the more
// probable come first.
struct DraftRows {
    int32_t* token_ids;
    int32_t* parents;
    int capacity;
    int size;
    int32_t confidence;

    bool has_room() const { return size < capacity; }
    int add(int32_t token_id, int32_t parent) {
        token_ids[size] = token_id;
        parents[size] = parent;
        return size++;
    }
};

class Lookup {
public:
    virtual ~Lookup() = default;

    // Moves to a text whose first `start` tokens are known, and whose others are `tokens`. Returns false, and changes
    // nothing, where the known text has other tokens there and `whole` is not set; otherwise what differs is removed.
    bool advance(const int32_t* tokens, size_t num_tokens, size_t start, bool whole);
    // Adds up to `num_tokens` levels of tokens that may follow, as far as `rows` has room.
    virtual void propose(int num_tokens, DraftRows& rows) const = 0;
    virtual size_t num_bytes() const = 0;

protected:
    virtual void push(int32_t token_id) = 0;
    virtual void pop() = 0;
    // Grows by an eighth: the plan counts the bytes of each token.
    static void append(std::vector<int32_t>& to, int32_t value);

    std::vector<int32_t> text_;
};

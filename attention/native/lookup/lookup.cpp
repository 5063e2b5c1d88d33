// Prompt lookup, and a table of which token follows which two.
//
// Both take constant time for a token that is appended: a decode step of a small model takes 3 ms, and drafting must
// not be seen in it.

#include "lookup/lookup.h"

#include <algorithm>
#include <memory>

#include "c_api.h"

bool Lookup::advance(const int32_t* tokens, size_t num_tokens, size_t start, bool whole) {
    if (start > text_.size()) return false;
    const size_t most = std::min(text_.size() - start, num_tokens);
    size_t common = 0;
    while (common < most && text_[start + common] == tokens[common]) ++common;
    if (start + common < text_.size() && !whole) return false;
    while (text_.size() > start + common) pop();
    for (size_t i = common; i < num_tokens; ++i) push(tokens[i]);
    return true;
}

void Lookup::append(std::vector<int32_t>& to, int32_t value) {
    if (to.size() == to.capacity()) to.reserve(to.size() + to.size() / 8 + 64);
    to.push_back(value);
}

namespace {

constexpr size_t kMinMatch = 3;
constexpr size_t kMaxMatch = 32;  // longer matches count as equally long
constexpr int kMaxCandidates = 32;
constexpr size_t kMatchClasses[] = {4, 6, 8, 12, 20};
constexpr int kHeadBits = 12;

// Looks up the end of the text in the text itself. Positions are chained by a hash of the tokens that end there, each
// to the one before it, so that a text can also be shortened.
class Ngram final : public Lookup {
public:
    Ngram() : heads_(size_t(1) << kHeadBits, -1) {}

    void propose(int num_tokens, DraftRows& rows) const override {
        if (text_.size() <= kMinMatch) return;
        Match matches[kMaxCandidates];
        const int num_matches = find(matches);
        if (num_matches == 0) return;
        const Match& longest = matches[0];
        for (const size_t least : kMatchClasses) rows.confidence += longest.length >= least;
        const int num_branches = longest.length >= kMaxMatch ? 1 : num_matches;
        int32_t begun[kMaxSiblings + 1];
        int num_begun = 0;
        for (int i = 0; i < num_branches && num_begun <= kMaxSiblings; ++i) {
            const size_t first = matches[i].position + 1;
            if (std::find(begun, begun + num_begun, text_[first]) != begun + num_begun) continue;
            begun[num_begun++] = text_[first];
            add_following(first, num_tokens, rows);
        }
    }

    size_t num_bytes() const override {
        return sizeof(*this) + sizeof(int32_t) * (text_.capacity() + earlier_.capacity() + heads_.capacity());
    }

protected:
    void push(int32_t token_id) override {
        append(text_, token_id);
        int32_t& head = heads_[hash()];
        append(earlier_, head);
        head = int32_t(text_.size() - 1);
    }

    void pop() override {
        heads_[hash()] = earlier_.back();
        earlier_.pop_back();
        text_.pop_back();
    }

private:
    struct Match {
        size_t length, position;
    };

    // Finds earlier positions that end as the text does, the longest match first, of equal ones the most recent.
    int find(Match* matches) const {
        int count = 0;
        int32_t position = earlier_.back();
        for (int i = 0; i < kMaxCandidates && position >= 0; ++i, position = earlier_[position]) {
            const size_t length = match(size_t(position));
            if (length >= kMinMatch) matches[count++] = {length, size_t(position)};
            if (length >= kMaxMatch) break;
        }
        std::sort(matches, matches + count, [](const Match& a, const Match& b) {
            return a.length != b.length ? a.length > b.length : a.position > b.position;
        });
        return count;
    }

    size_t match(size_t position) const {
        const size_t last = text_.size() - 1, most = std::min(kMaxMatch, position + 1);
        size_t length = 0;
        while (length < most && text_[position - length] == text_[last - length]) ++length;
        return length;
    }

    // At the end of the text it repeats, as the text would.
    void add_following(size_t first, int num_tokens, DraftRows& rows) const {
        const size_t length = text_.size() - first;
        int parent = kText;
        for (int i = 0; i < num_tokens && rows.has_room(); ++i)
            parent = rows.add(text_[first + size_t(i) % length], parent);
    }

    size_t hash() const {
        uint32_t value = 0;
        for (size_t i = text_.size() - std::min(text_.size(), kMinMatch); i < text_.size(); ++i)
            value = value * 0x9E3779B1u + uint32_t(text_[i]) + 1;
        return value >> (32 - kHeadBits);
    }

    std::vector<int32_t> earlier_;  // for each position the one before it with the same hash; -1 for none
    std::vector<int32_t> heads_;
};

constexpr int kKeyBits = 14;
constexpr int kFollowers = 4;
constexpr uint8_t kMaxWeight = 64;
constexpr double kMinShare = 0.4;
constexpr double kShareClasses[] = {0.6, 0.8, 0.95};

// Proposes the most frequent follower of the last two tokens, then of the next two, and so on. What was learned of
// tokens that are removed stays.
class Trigram final : public Lookup {
public:
    Trigram() : entries_(size_t(1) << kKeyBits) {}

    void propose(int num_tokens, DraftRows& rows) const override {
        if (text_.size() < 2) return;
        int32_t left = text_[text_.size() - 2], right = text_.back();
        int last = kText;
        for (int i = 0; i < num_tokens; ++i) {
            const Entry* entry = entry_of(left, right);
            if (!entry) break;
            int order[kFollowers], count = 0, total = 0;
            for (int f = 0; f < kFollowers; ++f)
                if (entry->weights[f]) order[count++] = f, total += entry->weights[f];
            if (!count) break;
            std::stable_sort(order, order + count, [&](int a, int b) { return entry->weights[a] > entry->weights[b]; });
            const int weight = entry->weights[order[0]];
            const double share = double(weight) / total;
            if (share < kMinShare) break;
            if (last == kText) {
                for (const double least : kShareClasses) rows.confidence += 2 * (share >= least);
                rows.confidence += weight > 1;
            }
            const int parent = last;
            for (int f = 0; f < std::min(count, kMaxSiblings + 1) && rows.has_room(); ++f) {
                const int row = rows.add(entry->followers[order[f]], parent);
                if (f == 0) last = row;
            }
            if (last == parent) break;
            left = right;
            right = entry->followers[order[0]];
        }
    }

    size_t num_bytes() const override {
        return sizeof(*this) + sizeof(int32_t) * text_.capacity() + sizeof(Entry) * entries_.capacity();
    }

protected:
    void push(int32_t token_id) override {
        append(text_, token_id);
        const size_t n = text_.size();
        if (n > 2) learn(text_[n - 3], text_[n - 2], token_id);
    }

    void pop() override { text_.pop_back(); }

private:
    struct Entry {
        int32_t left = -1, right = -1;
        int32_t followers[kFollowers] = {-1, -1, -1, -1};
        uint8_t weights[kFollowers] = {};

        bool is_of(int32_t l, int32_t r) const { return left == l && right == r; }
    };

    static size_t slot(int32_t left, int32_t right) {
        return (uint32_t(left) * 0x9E3779B1u + uint32_t(right) * 0x85EBCA6Bu) >> (32 - kKeyBits);
    }

    const Entry* entry_of(int32_t left, int32_t right) const {
        const Entry& entry = entries_[slot(left, right)];
        return entry.is_of(left, right) ? &entry : nullptr;
    }

    void learn(int32_t left, int32_t right, int32_t token_id) {
        Entry& entry = entries_[slot(left, right)];
        uint8_t* const weights = entry.weights;
        if (!entry.is_of(left, right)) {
            // Another pair has the slot: it fades, and leaves once nothing is left of it.
            const auto is_empty = [&] { return std::all_of(weights, weights + kFollowers, [](uint8_t w) { return !w; }); };
            if (!is_empty()) {
                for (int f = 0; f < kFollowers; ++f) weights[f] /= 2;
                if (!is_empty()) return;
            }
            entry.left = left;
            entry.right = right;
        }
        int at = 0;
        while (at < kFollowers && !(entry.followers[at] == token_id && weights[at])) ++at;
        if (at == kFollowers) {
            at = int(std::min_element(weights, weights + kFollowers) - weights);
            entry.followers[at] = token_id;
            weights[at] = 0;
        }
        if (weights[at] == kMaxWeight)
            for (int f = 0; f < kFollowers; ++f) weights[f] /= 2;
        ++weights[at];
    }

    std::vector<Entry> entries_;
};

}  // namespace

// Returns a new lookup: prompt lookup (kind 0) or a table of followers (kind 1). Null if there is no memory.
LOWTIDE_API void* lowtide_lookup_new(int kind) {
    std::unique_ptr<Lookup> made;
    const auto make = [&] {
        if (kind == 0)
            made = std::make_unique<Ngram>();
        else
            made = std::make_unique<Trigram>();
        return true;
    };
    return error_code(make) ? nullptr : made.release();
}

LOWTIDE_API void lowtide_lookup_free(void* lookup) { delete static_cast<Lookup*>(lookup); }

LOWTIDE_API size_t lowtide_lookup_num_bytes(const void* lookup) { return static_cast<const Lookup*>(lookup)->num_bytes(); }

// Returns 0; 1 if there is no memory; 2 where `Lookup::advance` returns false.
LOWTIDE_API int lowtide_lookup_advance(void* lookup, const int32_t* tokens, size_t num_tokens, size_t start, int whole) {
    return error_code([&] { return static_cast<Lookup*>(lookup)->advance(tokens, num_tokens, start, whole != 0); });
}

// Writes at most `capacity` rows, and returns how many.
LOWTIDE_API int lowtide_lookup_propose(const void* lookup, int num_tokens, int32_t* token_ids, int32_t* parents, int capacity, int32_t* confidence) {
    DraftRows rows{token_ids, parents, capacity, 0, 0};
    if (num_tokens > 0) static_cast<const Lookup*>(lookup)->propose(num_tokens, rows);
    *confidence = rows.confidence;
    return rows.size;
}

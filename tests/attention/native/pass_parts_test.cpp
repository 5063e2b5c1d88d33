// Sequences whose keys lie among one another's in a cache: each part's rows are, bit for bit, those of its keys alone
// in a cache, with any number of threads; and a mask that says otherwise is not taken for one that agrees.

#include "pass_parts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "attend.h"
#include "checks.h"
#include "random_problem.h"

namespace {

struct Sequences {
    int num_shared = 0;
    std::vector<int32_t> num_rows, num_cells;
    std::vector<std::vector<int32_t>> cells;

    void tell(PassParts& parts) const {
        std::vector<const int32_t*> pointers;
        for (const auto& own : cells) pointers.push_back(own.data());
        parts.set(num_shared, int(num_rows.size()), num_rows.data(), pointers.data(), num_cells.data());
    }
};

// Deals the rows and the cells behind the shared ones out, and has each row see what its sequence has, but for the
// cells of the rows behind it.
Sequences deal(Case& c) {
    Sequences s;
    const AttentionProblem& p = c.p;
    s.num_shared = pick(0, p.num_keys / 2);
    for (int left = p.num_rows; left > 0; left -= s.num_rows.back()) s.num_rows.push_back(pick(1, left));
    s.cells.resize(s.num_rows.size());
    for (int cell = s.num_shared; cell < p.num_keys; ++cell)
        if (pick(0, 8) != 0) s.cells[pick(0, int(s.cells.size()) - 1)].push_back(cell);
    for (int i = 0; i < p.num_rows * p.num_keys; ++i) c.mask[i] = kHiddenKey;
    for (size_t i = 0, row = 0; i < s.cells.size(); ++i) {
        s.num_cells.push_back(int(s.cells[i].size()));
        for (int r = 0; r < s.num_rows[i]; ++r, ++row) {
            uint16_t* mask = c.mask.get() + row * p.num_keys;
            const int hidden = s.num_rows[i] - 1 - r, own = s.num_cells[i];
            for (int j = 0; j < s.num_shared; ++j) mask[j] = 0;
            for (int j = 0; j < own - hidden; ++j) mask[s.cells[i][j]] = 0;
        }
    }
    return s;
}

bool sees_something(const Case& c) {
    for (int row = 0; row < c.p.num_rows; ++row) {
        int seen = 0;
        for (int j = 0; j < c.p.num_keys; ++j) seen += c.mask_of(row, j) != kHiddenKey;
        if (seen == 0) return false;
    }
    return true;
}

// The keys, values and masks of a part, side by side and padded with hidden ones as llama.cpp pads them.
struct Alone {
    std::vector<uint16_t> k, v, mask;
    std::vector<float> out;
    AttentionProblem p;

    Alone(const AttentionProblem& whole, const AttentionProblem& part) : p(part) {
        const int keys = (part.num_keys + 255) / 256 * 256, kv_heads = p.num_kv_heads;
        k.resize(size_t(keys) * kv_heads * p.key_size), v.resize(size_t(keys) * kv_heads * p.value_size);
        mask.assign(size_t(keys) * p.num_rows, kHiddenKey);
        out.resize(size_t(p.num_rows) * p.num_heads * p.value_size);
        for (int j = 0; j < part.num_keys; ++j) {
            const int cell = part.selected[j];
            std::memcpy(&k[size_t(j) * kv_heads * p.key_size], whole.k + cell * whole.k_key_stride, whole.k_key_stride);
            std::memcpy(&v[size_t(j) * kv_heads * p.value_size], whole.v + cell * whole.v_key_stride, whole.v_key_stride);
            for (int row = 0; row < p.num_rows; ++row)
                mask[size_t(row) * keys + j] = reinterpret_cast<const uint16_t*>(part.mask + row * part.mask_row_stride)[cell];
        }
        p.k = reinterpret_cast<char*>(k.data()), p.v = reinterpret_cast<char*>(v.data());
        p.mask = reinterpret_cast<char*>(mask.data()), p.mask_row_stride = 2 * keys;
        p.out = reinterpret_cast<char*>(out.data()), p.selected = nullptr, p.num_keys = keys;
    }
};

void run(Attend& attend, const AttentionProblem& p, const KernelSet& kernels, int num_threads) {
    require(attend.reserve(p, num_threads), "there is no memory");
    on_threads(num_threads, [&](int thread) { attend.run(p, kernels, thread, num_threads); });
}

// All parts at once are what they are one after another, which is what they left.
void check_many(Case& c, PassParts& parts, const KernelSet& kernels, int num_threads) {
    if (!sees_something(c)) return;
    const size_t num_out = size_t(c.p.num_rows) * c.p.num_heads * c.p.value_size;
    const std::vector<float> before(c.out.get(), c.out.get() + num_out);
    std::fill_n(c.out.get(), num_out, 7.0f);
    Attend attend;
    require(attend.reserve_many(c.p, num_threads), "there is no memory");
    on_threads(num_threads, [&](int thread) {
        if (parts.agree(c.p, 0, num_threads)) attend.run_many(parts.problems(), parts.num_parts(), kernels, thread, num_threads);
    });
    require(std::memcmp(before.data(), c.out.get(), sizeof(float) * num_out) == 0, "%s: %d parts at once are others", kernels.name,
            parts.num_parts());
}

void check(Case& c, const KernelSet& kernels) {
    c.p.rounded = 0;
    const Sequences s = deal(c);
    PassParts parts;
    require(!parts.active(), "parts are active before any are told");
    s.tell(parts);
    const int num_threads = pick(1, 3);
    bool agree[3];
    on_threads(num_threads, [&](int thread) { agree[thread] = parts.agree(c.p, 0, num_threads); });
    for (int thread = 0; thread < num_threads; ++thread)
        require(agree[thread] == sees_something(c), "thread %d finds that parts %sagree", thread, agree[thread] ? "" : "do not ");
    Attend attend, alone;
    for (int i = 0; i < parts.num_parts(); ++i) {
        const AttentionProblem part = parts.problem(c.p, i);
        if (part.num_keys == 0) continue;
        Alone expected(c.p, part);
        run(attend, part, kernels, num_threads);
        run(alone, expected.p, kernels, 1);
        const size_t row_bytes = sizeof(float) * part.num_heads * part.value_size;
        require(std::memcmp(part.out, expected.out.data(), row_bytes * part.num_rows) == 0, "%s: part %d of %d is not as it is alone",
                kernels.name, i, parts.num_parts());
    }
    check_many(c, parts, kernels, num_threads);
    parts.set(0, 0, nullptr, nullptr, nullptr);
    require(!parts.active(), "parts stay when there are none");
}

// A row that sees another sequence's key, cells beyond the cache, and rows that nobody has.
void check_refusals() {
    Case c = some_case(false);
    while (c.p.num_keys < 8 || c.p.num_rows < 2) c = some_case(false);
    for (int i = 0; i < c.p.num_rows * c.p.num_keys; ++i) c.mask[i] = i % c.p.num_keys < 4 ? 0 : kHiddenKey;
    const auto agrees = [&](const Sequences& s) {
        PassParts parts;
        s.tell(parts);
        const bool found = parts.agree(c.p, 0, 1);
        require(parts.agree(c.p, 1, 1) == found, "the next layer finds otherwise");
        require(parts.num_refused() == !found, "%d masks are refused", int(parts.num_refused()));
        return found;
    };
    const int rows = c.p.num_rows;
    require(agrees({4, {1, rows - 1}, {0, 0}, {{}, {}}}), "what is so is refused");
    require(agrees({2, {1, rows - 1}, {2, 3}, {{2, 3}, {2, 3, 5}}}), "a hidden key of its own is refused");
    require(!agrees({3, {1, rows - 1}, {1, 0}, {{3}, {}}}), "a key of another is taken");
    require(!agrees({4, {1, rows - 1}, {1, 0}, {{c.p.num_keys}, {}}}), "a cell beyond the cache is taken");
    require(!agrees({4, {1, rows}, {0, 0}, {{}, {}}}), "rows that are not there are taken");
    require(!agrees({4, {rows - 1}, {0}, {{}}}), "a row of nobody is taken");
}

}  // namespace

int main() {
    int num_checked = 0;
    check_refusals();
    for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
        const KernelSet* kernels = find_kernels(name);
        if (kernels == nullptr) continue;
        for (int i = 0; i < 12; ++i, ++num_checked) {
            Case c = some_case(false);
            check(c, *kernels);
        }
    }
    std::printf("%d passes agree\n", num_checked);
    return num_checked == 0;
}

#include "piece_attend.h"

#include <chrono>
#include <cstring>
#include <new>
#include <system_error>
#include <vector>

#include "crew.h"
#include "half.h"
#include "tidal_attend.h"

namespace {

// Below so many products a second thread wakes up later than one is done.
constexpr size_t kProductsWorthAThread = 200000;

size_t element_bytes(KvType type) { return type == KvType::f32 ? 4 : 2; }

void read_floats(const char* from, KvType element, int count, float* to) {
    if (element == KvType::f32) {
        std::memcpy(to, from, sizeof(float) * count);
        return;
    }
    const auto* halves = reinterpret_cast<const uint16_t*>(from);
    for (int i = 0; i < count; ++i) to[i] = half_to_float(halves[i]);
}

void write_floats(const float* from, KvType element, int count, char* to) {
    if (element == KvType::f32) {
        std::memcpy(to, from, sizeof(float) * count);
        return;
    }
    auto* halves = reinterpret_cast<uint16_t*>(to);
    for (int i = 0; i < count; ++i) halves[i] = float_to_half(from[i]);
}

// RoFormer's rotary embedding (Su et al., arXiv 2104.09864), with cosines and sines as the graph has them.
void turn_heads(const PieceRows& rows, int position, int num_heads, float* heads) {
    if (rows.cosines == nullptr) return;
    const int pairs = rows.rotary_pairs, step = rows.interleaved ? 2 : 1, apart = rows.interleaved ? 1 : pairs;
    const float* cosines = rows.cosines + size_t(position) * pairs;
    const float* sines = rows.sines + size_t(position) * pairs;
    for (float* head = heads; head < heads + num_heads * rows.head_size; head += rows.head_size)
        for (int i = 0; i < pairs; ++i) {
            float &one = head[i * step], &other = head[i * step + apart];
            const float turned = one * cosines[i] - other * sines[i];
            other = one * sines[i] + other * cosines[i];
            one = turned;
        }
}

bool known_shape(const PieceRows& p) {
    const bool sized = p.head_size > 0 && p.head_size <= kMaxHeadSize && p.head_size % 16 == 0;
    return sized && p.num_rows > 0 && p.num_past >= 0 && p.num_kv_heads > 0 && p.num_heads > 0 && p.num_heads % p.num_kv_heads == 0 &&
           p.rotary_pairs >= 0 && 2 * p.rotary_pairs <= p.head_size;
}

}  // namespace

class PieceAttend {
public:
    PieceAttend(const KernelSet& kernels, int num_threads) : kernels(kernels), crew_(num_threads) {}

    const KernelSet& kernels;
    TidalAttend attend;
    PieceCounts counts{};
    bool rounded = false;

    int run(const PieceRows& rows) {
        const auto start = std::chrono::steady_clock::now();
        append(rows);
        const AttentionProblem problem = problem_of(rows);
        const int num_threads = worth_threads(problem);
        if (!attend.reserve(problem, rows.layer, num_threads)) return 1;
        int num_read = 0;
        const auto work = [&](int thread) {
            if (thread >= num_threads) return;
            const int read = attend.run(problem, rows.layer, kernels, thread, num_threads);
            if (thread == 0) num_read = read;
        };
        if (num_threads == 1) work(0);
        else crew_.run(work);
        give_out(rows);
        counts.keys_read += num_read, counts.keys_held += problem.num_keys;
        counts.nanoseconds += (std::chrono::steady_clock::now() - start).count();
        return 0;
    }

    size_t scratch_bytes() const { return attend.scratch_bytes() + sizeof(float) * (queries_.size() + keys_.size() + out_.size()); }

private:
    void append(const PieceRows& rows) {
        const int width = rows.num_heads * rows.head_size, kv_width = rows.num_kv_heads * rows.head_size;
        const auto element = KvType(rows.element), cache_type = KvType(rows.cache_type);
        queries_.resize(size_t(rows.num_rows) * width), keys_.resize(kv_width);
        if (element != KvType::f32) out_.resize(queries_.size());
        for (int row = 0; row < rows.num_rows; ++row) {
            const int position = rows.num_past + row;
            float* query = queries_.data() + size_t(row) * width;
            read_floats(rows.q + row * rows.q_row_stride, element, width, query);
            turn_heads(rows, position, rows.num_heads, query);
            const size_t cell = size_t(position) * kv_width * element_bytes(cache_type);
            read_floats(rows.k + row * rows.k_row_stride, element, kv_width, keys_.data());
            turn_heads(rows, position, rows.num_kv_heads, keys_.data());
            write_floats(keys_.data(), cache_type, kv_width, rows.k_cache + cell);
            read_floats(rows.v + row * rows.v_row_stride, element, kv_width, keys_.data());
            write_floats(keys_.data(), cache_type, kv_width, rows.v_cache + cell);
        }
    }

    AttentionProblem problem_of(const PieceRows& rows) {
        const size_t head = rows.head_size * sizeof(float), width = rows.num_heads * head;
        const size_t kv_head = rows.head_size * element_bytes(KvType(rows.cache_type)), cell = rows.num_kv_heads * kv_head;
        AttentionProblem p{};
        p.q = reinterpret_cast<const char*>(queries_.data()), p.q_row_stride = width, p.q_head_stride = head;
        p.k = rows.k_cache, p.k_key_stride = cell, p.k_head_stride = kv_head;
        p.v = rows.v_cache, p.v_key_stride = cell, p.v_head_stride = kv_head;
        p.mask = rows.mask, p.mask_row_stride = rows.mask_row_stride;
        const bool direct = KvType(rows.element) == KvType::f32;
        p.out = direct ? rows.out : reinterpret_cast<char*>(out_.data());
        p.out_row_stride = direct ? rows.out_row_stride : width, p.out_head_stride = head;
        p.k_type = p.v_type = KvType(rows.cache_type);
        p.num_rows = rows.num_rows, p.num_keys = rows.num_past + rows.num_rows;
        p.num_heads = rows.num_heads, p.num_kv_heads = rows.num_kv_heads, p.key_size = p.value_size = rows.head_size;
        p.scale = rows.scale, p.softcap = rows.softcap, p.sinks = rows.sinks, p.rounded = rounded;
        return p;
    }

    int worth_threads(const AttentionProblem& p) const {
        const size_t products = size_t(p.num_rows) * p.num_heads * p.num_keys * p.key_size;
        return products < kProductsWorthAThread ? 1 : crew_.num_threads();
    }

    void give_out(const PieceRows& rows) {
        if (KvType(rows.element) == KvType::f32) return;
        const int width = rows.num_heads * rows.head_size;
        for (int row = 0; row < rows.num_rows; ++row)
            write_floats(out_.data() + size_t(row) * width, KvType(rows.element), width, rows.out + row * rows.out_row_stride);
    }

    Crew crew_;
    std::vector<float> queries_, keys_, out_;
};

extern "C" PieceAttend* lowtide_pieces_new(const char* kernels, int num_threads) {
    const KernelSet* found = find_kernels(kernels);
    if (found == nullptr || num_threads < 1) return nullptr;
    try {
        return new PieceAttend(*found, num_threads);
    } catch (const std::bad_alloc&) {
    } catch (const std::system_error&) {
    }
    return nullptr;
}

extern "C" void lowtide_pieces_free(PieceAttend* pieces) { delete pieces; }

extern "C" int lowtide_pieces_can_round(const PieceAttend* pieces) { return pieces->kernels.attend_rounded != nullptr; }

extern "C" const char* lowtide_pieces_kernels(const PieceAttend* pieces) { return pieces->kernels.name; }

extern "C" int lowtide_pieces_set_roles(PieceAttend* pieces, const uint8_t* roles, int num_layers, const SelectionRule* rule) {
    try {
        pieces->attend.set_roles(roles, num_layers, *rule);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

extern "C" void lowtide_pieces_start_pass(PieceAttend* pieces, int sparse, int refresh, int rounded) {
    pieces->attend.start_pass(sparse != 0, refresh != 0);
    pieces->rounded = rounded != 0;
}

extern "C" int lowtide_pieces_attend(PieceAttend* pieces, const PieceRows* rows) {
    if (!known_shape(*rows)) return 2;
    try {
        return pieces->run(*rows);
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

extern "C" PieceCounts lowtide_pieces_counts(const PieceAttend* pieces) {
    PieceCounts counts = pieces->counts;
    counts.scratch_bytes = int64_t(pieces->scratch_bytes());
    return counts;
}

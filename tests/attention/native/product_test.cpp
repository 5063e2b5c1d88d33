// Products of packed matrices against the same matrices unpacked and multiplied in plain loops: every format, every
// kernel set of this processor, odd numbers of panels and rows, more threads than there is room for, panels that are
// told of when they were read. Arrays are of exactly their size.

#include "product.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <set>
#include <vector>

#include "checks.h"
#include "pack.h"
#include "unpack.h"

namespace {

constexpr Format kFormats[] = {Format::f16,  Format::bf16, Format::q4_0, Format::q4_1, Format::q5_0,
                               Format::q5_1, Format::q8_0, Format::q4_k, Format::q5_k, Format::q6_k};
const char* const kSets[] = {"avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dot", "neon", "portable"};

bool is_super(Format format) { return shape_of(format).is_super; }

// Random bits, and halves that are small numbers; of weights that are not quantised these alone.
std::vector<uint8_t> random_blocks(Format format, int num_rows, int num_columns) {
    std::vector<uint8_t> blocks(lowtide_packed_bytes(int32_t(format), num_rows, num_columns));
    for (uint8_t& byte : blocks) byte = uint8_t(pick(0, 255));
    const int block_size = shape_of(format).is_float() ? 1 : is_super(format) ? 256 : 32;
    const size_t block_bytes = blocks.size() / num_rows / (num_columns / block_size);
    const bool is_last = format == Format::q6_k, two = shape_of(format).has_minima;
    for (size_t at = 0; at < blocks.size(); at += block_bytes)
        for (int i = 0; i < (two ? 2 : 1); ++i) {
            const auto half = uint16_t(0x2000 | pick(0, 0x3ff) | (pick(0, 1) << 15));  // about 0.01
            std::memcpy(&blocks[at + (is_last ? block_bytes - 2 : 2 * i)], &half, sizeof half);
        }
    return blocks;
}

struct Problem {
    Format format;
    int num_rows, num_columns, num_tokens, num_threads;
};

struct Read {
    std::mutex lock;
    std::set<const uint8_t*> begins;
    size_t num_bytes = 0;
};

void leave(const void* context, const uint8_t* begin, const uint8_t* end) {
    Read& read = *static_cast<Read*>(const_cast<void*>(context));
    const std::lock_guard<std::mutex> guard(read.lock);
    require(read.begins.insert(begin).second, "panels are read twice");
    read.num_bytes += size_t(end - begin);
}

void check(const Problem& p, const ProductKernels& kernels) {
    const std::vector<uint8_t> blocks = random_blocks(p.format, p.num_rows, p.num_columns);
    std::vector<uint8_t> panels(blocks.size());
    require(lowtide_pack(int32_t(p.format), blocks.data(), p.num_rows, p.num_columns, panels.data()) == 0, "it cannot be packed");
    const PackedMatrix matrix{int32_t(p.format), p.num_rows, p.num_columns, panels.data()};
    std::vector<float> rows(size_t(p.num_tokens) * p.num_columns), out(size_t(p.num_tokens) * p.num_rows, NAN);
    std::vector<std::vector<float>> again(Product::kUses, out);
    for (float& value : rows) value = float(pick(-127, 127));
    for (int i = 0; i < p.num_tokens; ++i)  // every block has a value of 127: nothing is rounded
        for (int block = 0; block < p.num_columns / kBlockSize; ++block) rows[size_t(i) * p.num_columns + block * kBlockSize] = 127.0f;

    Product product;
    require(product.reserve(p.num_tokens, p.num_columns, std::max(p.num_threads - 1, 1)), "no memory");
    require(product.has_room(p.num_tokens, p.num_columns) && !product.has_room(p.num_tokens + 40, p.num_columns + 4096), "wrong room");
    Read read;
    const PanelReader reader{leave, &read};
    on_threads(p.num_threads, [&](int thread) {
        product.run(matrix, rows.data(), p.num_columns, p.num_tokens, 0, out.data(), p.num_rows, kernels, &reader, thread, p.num_threads);
        for (int use = 1; use < Product::kUses; ++use)
            product.run(matrix, rows.data(), p.num_columns, p.num_tokens, use, again[use].data(), p.num_rows, kernels, nullptr, thread, p.num_threads);
    });
    require(read.num_bytes == panels.size(), "not every panel is read");
    for (int use = 1; use < Product::kUses; ++use)
        require(std::memcmp(out.data(), again[use].data(), out.size() * sizeof(float)) == 0, "rows that were quantised give something else");

    std::vector<float> weights(p.num_columns);
    for (int row = 0; row < p.num_rows; ++row) {
        unpack_row(matrix, row, weights.data());
        for (int i = 0; i < p.num_tokens; ++i) {
            double sum = 0, size = 0;
            for (int k = 0; k < p.num_columns; ++k) {
                const double product_of = double(weights[k]) * rows[size_t(i) * p.num_columns + k];
                sum += product_of, size += std::fabs(product_of);
            }
            const float found = out[size_t(i) * p.num_rows + row];
            require(std::fabs(found - sum) <= 1e-5 * size, "%s: %g instead of %g", kernels.name, double(found), sum);
        }
    }
}

}  // namespace

int main() {
    int num_problems = 0;
    for (const char* name : kSets) {
        const ProductKernels* kernels = find_product_kernels(name);
        if (kernels == nullptr) continue;
        for (const Format format : kFormats)
            for (const int num_tokens : {1, 5, 19}) {
                check({format, 16 * pick(1, 5), is_super(format) ? 256 * pick(1, 2) : 32 * pick(1, 7), num_tokens, pick(1, 3)}, *kernels);
                ++num_problems;
            }
    }
    require(lowtide_packed_bytes(3, 17, 32) == 0 && lowtide_packed_bytes(3, 16, 33) == 0 && lowtide_packed_bytes(99, 16, 32) == 0,
            "what has no packed form has a size");
    uint8_t nothing = 0;
    require(lowtide_pack(12, &nothing, 16, 128, &nothing) == 2, "what has no packed form is packed");
    std::printf("%d problems agree\n", num_problems);
}

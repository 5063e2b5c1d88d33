// Matmuls of repacked matrices against the same matrices dequantised and multiplied in plain loops: every format,
// every kernel set of this processor, odd numbers of tiles and rows, more threads than reserved, and the reports of
// tiles that were read. Buffers have exactly the needed size.

#include "matmul/matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <set>
#include <vector>

#include "checks.h"
#include "matmul/repack.h"
#include "matmul/repack.h"

namespace {

constexpr Format kFormats[] = {Format::f16,  Format::bf16, Format::q4_0, Format::q4_1, Format::q5_0,   Format::q5_1,   Format::q8_0, Format::q2_k,
                               Format::q3_k, Format::q4_k, Format::q5_k, Format::q6_k, Format::iq4_nl, Format::iq4_xs, Format::mxfp4};
const char* const kSets[] = {"avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dot", "neon", "portable"};

bool is_super(Format format) { return shape_of(format).is_super(); }

// Random bits, with small numbers as fp16 scales; F16 and BF16 weights are small numbers.
std::vector<uint8_t> random_blocks(Format format, int num_rows, int num_columns) {
    std::vector<uint8_t> blocks(lowtide_repacked_bytes(int32_t(format), num_rows, num_columns));
    for (uint8_t& byte : blocks) byte = uint8_t(pick(0, 255));
    const int block_size = shape_of(format).is_float() ? 1 : is_super(format) ? 256 : 32;
    const size_t block_bytes = blocks.size() / num_rows / (num_columns / block_size);
    const int num_halves = format == Format::mxfp4 ? 0 : shape_of(format).has_minima ? 2 : 1;
    const bool are_last = format == Format::q6_k || format == Format::q2_k || format == Format::q3_k;
    for (size_t at = 0; at < blocks.size(); at += block_bytes) {
        if (format == Format::mxfp4) blocks[at] = uint8_t(pick(110, 130));
        for (int i = 0; i < num_halves; ++i) {
            const auto half = uint16_t(0x2000 | pick(0, 0x3ff) | (pick(0, 1) << 15));  // about 0.01
            std::memcpy(&blocks[at + (are_last ? block_bytes - 2 * num_halves : 0) + 2 * i], &half, sizeof half);
        }
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

void on_read(const void* context, const uint8_t* begin, const uint8_t* end) {
    Read& read = *static_cast<Read*>(const_cast<void*>(context));
    const std::lock_guard<std::mutex> guard(read.lock);
    require(read.begins.insert(begin).second, "a tile is read twice");
    read.num_bytes += size_t(end - begin);
}

void check(const Problem& p, const MatmulKernels& kernels) {
    const std::vector<uint8_t> blocks = random_blocks(p.format, p.num_rows, p.num_columns);
    std::vector<uint8_t> tiles(blocks.size());
    require(lowtide_repack(int32_t(p.format), blocks.data(), p.num_rows, p.num_columns, tiles.data()) == 0,
            "the matrix cannot be repacked");
    const RepackedMatrix matrix{int32_t(p.format), p.num_rows, p.num_columns, tiles.data()};
    std::vector<float> rows(size_t(p.num_tokens) * p.num_columns), out(size_t(p.num_tokens) * p.num_rows, NAN);
    // matrices of different heights that multiply the same rows: the whole one, and its first tile
    const RepackedMatrix first_tile{int32_t(p.format), kTileRows, p.num_columns, tiles.data()};
    std::vector<float> whole(out), one_tile(size_t(p.num_tokens) * kTileRows, NAN);
    for (float& value : rows) value = float(pick(-127, 127));
    for (int i = 0; i < p.num_tokens; ++i)  // every block has a value of 127, so nothing is rounded
        for (int block = 0; block < p.num_columns / kBlockSize; ++block) rows[size_t(i) * p.num_columns + block * kBlockSize] = 127.0f;

    Matmul matmul;
    require(matmul.reserve(p.num_tokens, p.num_columns, std::max(p.num_threads - 1, 1)), "no memory");
    require(matmul.has_room(p.num_tokens, p.num_columns) && !matmul.has_room(p.num_tokens + 40, p.num_columns + 4096), "has_room is wrong");
    Read read;
    const TileObserver observer{on_read, &read};
    on_threads(p.num_threads, [&](int thread) {
        const MatmulTarget target{matrix, out.data(), size_t(p.num_rows)};
        matmul.run(&target, 1, rows.data(), p.num_columns, p.num_tokens, kernels, &observer, thread, p.num_threads);
    });
    on_threads(p.num_threads, [&](int thread) {  // the rows are quantised again
        const MatmulTarget both[] = {{first_tile, one_tile.data(), kTileRows}, {matrix, whole.data(), size_t(p.num_rows)}};
        matmul.run(both, 2, rows.data(), p.num_columns, p.num_tokens, kernels, nullptr, thread, p.num_threads);
    });
    require(read.num_bytes == tiles.size(), "not every tile is read");
    const auto are_equal = [&](const std::vector<float>& all, const std::vector<float>& first) {
        for (int i = 0; i < p.num_tokens; ++i)
            if (std::memcmp(&out[size_t(i) * p.num_rows], &first[size_t(i) * kTileRows], sizeof(float) * kTileRows) != 0) return false;
        return std::memcmp(out.data(), all.data(), out.size() * sizeof(float)) == 0;
    };
    require(are_equal(whole, one_tile), "several matrices at once have other results");

    Team team;
    team.reserve(p.num_threads, Matmul::aside_bytes(p.num_tokens, p.num_columns));
    for (int round = 0; round < 2; ++round) {
        std::vector<float> first(one_tile.size(), NAN), all(out.size(), NAN);
        const MatmulTarget both[] = {{first_tile, first.data(), kTileRows}, {matrix, all.data(), size_t(p.num_rows)}};
        matmul.run(both, 2, rows.data(), p.num_columns, p.num_tokens, kernels, nullptr, team);
        require(are_equal(all, first), "a team has another result");
    }
    team.settle();

    std::vector<float> weights(p.num_columns);
    for (int row = 0; row < p.num_rows; ++row) {
        dequantise_row(matrix, row, weights.data());
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
        const MatmulKernels* kernels = find_matmul_kernels(name);
        if (kernels == nullptr) continue;
        for (const Format format : kFormats)
            for (const int num_tokens : {1, 5, 19}) {
                check({format, 16 * pick(1, 5), is_super(format) ? 256 * pick(1, 2) : 32 * pick(1, 7), num_tokens, pick(1, 3)}, *kernels);
                ++num_problems;
            }
    }
    require(lowtide_repacked_bytes(3, 17, 32) == 0 && lowtide_repacked_bytes(3, 16, 33) == 0 && lowtide_repacked_bytes(99, 16, 32) == 0,
            "a matrix that cannot be repacked has a size");
    uint8_t nothing = 0;
    require(lowtide_repack(12, &nothing, 16, 128, &nothing) == 2, "a matrix that cannot be repacked is accepted");
    std::printf("%d problems agree\n", num_problems);
}

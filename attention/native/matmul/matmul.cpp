// Splits a matmul between threads, and dispatches to the kernels of the processor.

#include "matmul/matmul.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "cpu.h"
#include "matmul/kernels.h"

namespace {

size_t value_bytes(const QuantisedRows& rows) { return size_t(rows.num_rows) * rows.row_bytes(); }

}  // namespace

size_t quantised_bytes(int num_rows, int num_columns) {
    const QuantisedRows rows{num_rows, num_columns, nullptr, nullptr};
    return value_bytes(rows) + size_t(num_rows) * rows.scale_stride() * sizeof(BlockScale);
}

QuantisedRows quantised_rows(int num_rows, int num_columns, uint8_t* memory) {
    QuantisedRows rows{num_rows, num_columns, reinterpret_cast<int8_t*>(memory), nullptr};
    rows.scales = reinterpret_cast<BlockScale*>(memory + value_bytes(rows));
    return rows;
}

const MatmulKernels* find_matmul_kernels(const char* name) {
    const bool avx512 = processor_has("avx512f") && processor_has("avx512bw") && processor_has("avx512vl");
    const bool avx2 = processor_has("avx2") && processor_has("fma") && processor_has("f16c");
    const MatmulKernels* const usable[] = {
        avx512 && processor_has("avx512_vnni") ? vnni512_matmul_kernels() : nullptr,
        avx2 && processor_has("avx_vnni") ? vnni_matmul_kernels() : nullptr,
        avx2 ? avx2_matmul_kernels() : nullptr,
        processor_has("i8mm") ? i8mm_matmul_kernels() : nullptr,
        processor_has("dotprod") ? dot_matmul_kernels() : nullptr,
        portable_matmul_kernels(),
    };
    for (const MatmulKernels* kernels : usable)
        if (kernels != nullptr && (name == nullptr || std::strcmp(name, kernels->name) == 0)) return kernels;
    return nullptr;
}

namespace {

constexpr int kMinTiles = 4;
constexpr size_t kSliceBytes = 1 << 20;

// How many tiles a thread takes: fewer towards the end, so that no thread is left with many.
int tiles_to_take(int num_left, int num_workers, size_t tile_bytes, bool in_slices) {
    const int max_tiles = in_slices ? std::max(int(kSliceBytes / tile_bytes), 1) : num_left;
    return std::min({std::max(num_left / (2 * num_workers), kMinTiles), num_left, max_tiles});
}

}  // namespace

bool Matmul::reserve(int num_rows, int num_columns, int num_threads) {
    try {
        if (!has_room(num_rows, num_columns)) memory_.resize((quantised_bytes(num_rows, num_columns) + sizeof(CacheLine) - 1) / sizeof(CacheLine));
    } catch (const std::bad_alloc&) {
        return false;
    }
    reserved_threads_ = std::max(reserved_threads_, num_threads);
    return true;
}

void Matmul::run(const MatmulTarget* targets, int num_targets, const float* rows, size_t row_stride, int num_rows,
                 const MatmulKernels& kernels, const TileObserver* observer, int thread, int num_threads) {
    const RepackedMatrix& first = targets->matrix;
    if (!shape_of(Format(first.format)).is_float()) quantise(rows, row_stride, num_rows, first.num_columns, kernels, thread, num_threads);
    barrier_.wait(num_threads, [this] {
        for (int i = 0; i < kMaxTargets; ++i) restart(i);
    });
    for (int i = 0; i < num_targets; ++i)
        multiply(targets[i], {num_rows, row_stride, rows}, i, kernels, observer, thread, num_threads);
}

void Matmul::quantise(const float* rows, size_t row_stride, int num_rows, int num_columns, const MatmulKernels& kernels, int thread,
                      int num_threads) {
    const QuantisedRows quantised = quantised_rows(num_rows, num_columns, memory_.data()->bytes);
    const int num_workers = workers_of(num_threads);
    for (int i = thread; i < num_rows && thread < num_workers; i += num_workers) kernels.quantise(rows + i * row_stride, quantised, i);
}

void Matmul::multiply(const MatmulTarget& target, const FloatRows& rows, int index, const MatmulKernels& kernels,
                      const TileObserver* observer, int thread, int num_threads) {
    const RepackedMatrix& matrix = target.matrix;
    const int num_workers = workers_of(num_threads), tiles = matrix.num_tiles();
    if (thread >= num_workers) return;
    const size_t tile_bytes = layout_of(Format(matrix.format), matrix.num_columns).num_bytes;
    const bool is_float = shape_of(Format(matrix.format)).is_float();
    const QuantisedRows quantised = quantised_rows(rows.num_rows, matrix.num_columns, memory_.data()->bytes);
    std::atomic<int>& next_tile = next_tiles_[index];
    for (int first = next_tile; first < tiles;) {
        const int last = first + tiles_to_take(tiles - first, num_workers, tile_bytes, observer != nullptr);
        if (!next_tile.compare_exchange_weak(first, last)) continue;
        if (is_float)
            kernels.multiply_float(matrix, rows, first, last, target.out, target.out_stride);
        else
            kernels.multiply(matrix, quantised, first, last, target.out, target.out_stride);
        if (observer != nullptr) observer->on_read(observer->context, matrix.tiles + first * tile_bytes, matrix.tiles + last * tile_bytes);
        first = next_tile;
    }
}

namespace {

// With fewer multiplications, a helper would take longer to see the work than the caller to do it.
constexpr int64_t kMinSharedMultiplies = 60000;
constexpr int kMinSharedRows = 4;
constexpr size_t kAsideBytes = 64 << 10;

size_t tile_result_bytes(int num_rows) { return sizeof(float) * kTileRows * num_rows; }

// Rows of activations to quantise.
struct QuantiseWork {
    const float* rows;
    size_t row_stride;
    QuantisedRows quantised;
    const MatmulKernels* kernels;

    void compute(int begin, int end) const {
        for (int row = begin; row < end; ++row) kernels->quantise(rows + row * row_stride, quantised, row);
    }
    void compute_aside(int begin, int end, char* aside) const {
        const QuantisedRows to = quantised_rows(end - begin, quantised.num_columns, reinterpret_cast<uint8_t*>(aside));
        for (int row = begin; row < end; ++row) kernels->quantise(rows + row * row_stride, to, row - begin);
    }
    void put(int begin, int end, const char* aside) const {
        const size_t values = value_bytes(quantised_rows(1, quantised.num_columns, nullptr));
        const size_t scales = quantised.scale_stride();
        std::memcpy(quantised.q + begin * values, aside, (end - begin) * values);
        std::memcpy(quantised.scales + begin * scales, aside + (end - begin) * values, (end - begin) * scales * sizeof(BlockScale));
    }
};

// Tiles of several matrices to multiply, one matrix after the other.
struct MultiplyWork {
    MatmulTarget targets[Matmul::kMaxTargets];
    int num_targets;
    QuantisedRows rows;
    FloatRows floats;
    const MatmulKernels* kernels;
    TileObserver observer;  // without a function: none

    int num_tiles() const {
        int count = 0;
        for (int i = 0; i < num_targets; ++i) count += targets[i].matrix.num_tiles();
        return count;
    }
    void compute(int begin, int end) const {
        for_each_target(begin, end, [this](const MatmulTarget& target, int first, int last, int) {
            multiply(target.matrix, first, last, target.out, target.out_stride);
        });
    }
    void compute_aside(int begin, int end, char* aside) const {
        const size_t stride = size_t(end - begin) * kTileRows;
        for_each_target(begin, end, [&](const MatmulTarget& target, int first, int last, int before) {
            // the kernels write the columns of their tiles
            multiply(target.matrix, first, last, reinterpret_cast<float*>(aside) + (ptrdiff_t(before) - first) * kTileRows, stride);
        });
    }
    void put(int begin, int end, const char* aside) const {
        const size_t stride = size_t(end - begin) * kTileRows;
        for_each_target(begin, end, [&](const MatmulTarget& target, int first, int last, int before) {
            const auto* from = reinterpret_cast<const float*>(aside) + size_t(before) * kTileRows;
            for (int row = 0; row < floats.num_rows; ++row)
                std::memcpy(target.out + row * target.out_stride + size_t(first) * kTileRows, from + row * stride,
                            sizeof(float) * kTileRows * (last - first));
        });
    }

private:
    // Calls `work(target, first, last, before)` for the tiles of each target in the range; `before` tiles of the range
    // are those of earlier targets.
    template <class Work> void for_each_target(int begin, int end, const Work& work) const {
        int start = 0;
        for (int i = 0; i < num_targets; ++i) {
            const int tiles = targets[i].matrix.num_tiles(), first = std::max(begin - start, 0), last = std::min(end - start, tiles);
            if (first < last) work(targets[i], first, last, start + first - begin);
            start += tiles;
        }
    }
    void multiply(const RepackedMatrix& matrix, int begin, int end, float* to, size_t stride) const {
        if (shape_of(Format(matrix.format)).is_float())
            kernels->multiply_float(matrix, floats, begin, end, to, stride);
        else
            kernels->multiply(matrix, rows, begin, end, to, stride);
        if (observer.on_read == nullptr) return;
        const size_t tile_bytes = layout_of(Format(matrix.format), matrix.num_columns).num_bytes;
        observer.on_read(observer.context, matrix.tiles + begin * tile_bytes, matrix.tiles + end * tile_bytes);
    }
};

}  // namespace

size_t Matmul::aside_bytes(int num_rows, int num_columns) {
    return std::max({kAsideBytes, tile_result_bytes(num_rows), quantised_bytes(1, num_columns)});
}

void Matmul::run(const MatmulTarget* targets, int num_targets, const float* rows, size_t row_stride, int num_rows,
                 const MatmulKernels& kernels, const TileObserver* observer, Team& team) {
    const RepackedMatrix& matrix = targets->matrix;
    const QuantisedRows quantised = quantised_rows(num_rows, matrix.num_columns, memory_.data()->bytes);
    if (!shape_of(Format(matrix.format)).is_float()) {
        const int max_range = int(team.aside_bytes() / quantised_bytes(1, matrix.num_columns));
        team.share(QuantiseWork{rows, row_stride, quantised, &kernels}, num_rows, kMinSharedRows, std::max(max_range, 1));
    }
    MultiplyWork work{};
    work.num_targets = num_targets, work.rows = quantised, work.floats = {num_rows, row_stride, rows}, work.kernels = &kernels;
    if (observer != nullptr) work.observer = *observer;
    size_t tile_bytes = 0;
    for (int i = 0; i < num_targets; ++i) {
        work.targets[i] = targets[i];
        tile_bytes = std::max(tile_bytes, layout_of(Format(targets[i].matrix.format), matrix.num_columns).num_bytes);
    }
    const int num_tiles = work.num_tiles();
    const bool is_small = int64_t(num_rows) * num_tiles * kTileRows * matrix.num_columns < kMinSharedMultiplies;
    int max_range = std::max(int(team.aside_bytes() / tile_result_bytes(num_rows)), 1);
    if (observer != nullptr) max_range = std::min(max_range, std::max(int(kSliceBytes / tile_bytes), 1));
    team.share(work, num_tiles, is_small ? num_tiles : kMinTiles, max_range);
}

extern "C" int lowtide_has_matmul_kernels(const char* kernels) { return find_matmul_kernels(kernels) != nullptr; }

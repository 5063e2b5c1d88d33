#include "product.h"

#include <algorithm>
#include <new>

namespace {

constexpr int kLeastPanels = 4;
constexpr size_t kSliceBytes = 1 << 20;

// How many panels a thread takes: fewer towards the end, so that no thread is left with many.
int panels_to_take(int left, int num_workers, size_t panel_bytes, bool in_slices) {
    const int most = in_slices ? std::max(int(kSliceBytes / panel_bytes), 1) : left;
    return std::min({std::max(left / (2 * num_workers), kLeastPanels), left, most});
}

}  // namespace

bool Product::reserve(int num_rows, int num_columns, int num_threads) {
    try {
        if (!has_room(num_rows, num_columns)) memory_.resize((quantised_bytes(num_rows, num_columns) + sizeof(Line) - 1) / sizeof(Line));
    } catch (const std::bad_alloc&) {
        return false;
    }
    reserved_threads_ = std::max(reserved_threads_, num_threads);
    return true;
}

void Product::run(const PackedMatrix& matrix, const float* rows, size_t row_stride, int num_rows, int use, float* out,
                  size_t out_stride, const ProductKernels& kernels, const PanelReader* reader, int thread, int num_threads) {
    if (use == 0) {
        if (!shape_of(Format(matrix.format)).is_float()) quantise(rows, row_stride, num_rows, matrix.num_columns, kernels, thread, num_threads);
        barrier_.wait(num_threads, [this] {
            for (int i = 0; i < kUses; ++i) restart(i);
        });
    }
    multiply(matrix, {num_rows, row_stride, rows}, use, out, out_stride, kernels, reader, thread, num_threads);
}

void Product::quantise(const float* rows, size_t row_stride, int num_rows, int num_columns, const ProductKernels& kernels, int thread,
                       int num_threads) {
    const QuantisedRows quantised = quantised_rows(num_rows, num_columns, memory_.data()->bytes);
    const int num_workers = workers_of(num_threads);
    for (int i = thread; i < num_rows && thread < num_workers; i += num_workers) kernels.quantise(rows + i * row_stride, quantised, i);
}

void Product::multiply(const PackedMatrix& matrix, const FloatRows& rows, int use, float* out, size_t out_stride, const ProductKernels& kernels,
                       const PanelReader* reader, int thread, int num_threads) {
    const int num_workers = workers_of(num_threads), panels = matrix.num_panels();
    if (thread >= num_workers) return;
    const size_t panel_bytes = layout_of(Format(matrix.format), matrix.num_columns).num_bytes;
    const bool is_float = shape_of(Format(matrix.format)).is_float();
    const QuantisedRows quantised = quantised_rows(rows.num_rows, matrix.num_columns, memory_.data()->bytes);
    std::atomic<int>& next_panel = next_panels_[use];
    for (int first = next_panel; first < panels;) {
        const int last = first + panels_to_take(panels - first, num_workers, panel_bytes, reader != nullptr);
        if (!next_panel.compare_exchange_weak(first, last)) continue;
        if (is_float)
            kernels.multiply_floats(matrix, rows, first, last, out, out_stride);
        else
            kernels.multiply(matrix, quantised, first, last, out, out_stride);
        if (reader != nullptr) reader->leave(reader->context, matrix.panels + first * panel_bytes, matrix.panels + last * panel_bytes);
        first = next_panel;
    }
}

#include "product.h"

#include <algorithm>
#include <new>

namespace {

constexpr size_t kAlignment = 64;
constexpr int kRunPanels = 4;

}  // namespace

bool Product::reserve(int num_rows, int num_columns, int num_threads) {
    const size_t wanted = quantised_bytes(num_rows, num_columns) + kAlignment;
    try {
        if (memory_.size() < wanted) memory_.resize(wanted);
    } catch (const std::bad_alloc&) {
        return false;
    }
    reserved_threads_ = std::max(reserved_threads_, num_threads);
    return true;
}

void Product::run(const PackedMatrix& matrix, const float* rows, size_t row_stride, int num_rows, bool are_quantised, float* out,
                  size_t out_stride, const ProductKernels& kernels, int thread, int num_threads) {
    const int num_workers = std::min(num_threads, reserved_threads_), panels = num_panels(matrix.num_rows);
    const auto begin = (reinterpret_cast<uintptr_t>(memory_.data()) + kAlignment - 1) / kAlignment * kAlignment;
    const QuantisedRows quantised = quantised_rows(num_rows, matrix.num_columns, reinterpret_cast<uint8_t*>(begin));
    if (!are_quantised)
        for (int i = thread; i < num_rows && thread < num_workers; i += num_workers) kernels.quantise(rows + i * row_stride, quantised, i);
    barrier_.wait(num_threads, [this] { next_panel_ = 0; });
    if (thread >= num_workers) return;
    // Runs of panels, shorter towards the end: no thread is left with a long one.
    for (int first = next_panel_, last; first < panels;) {
        last = std::min(first + std::max((panels - first) / (2 * num_workers), kRunPanels), panels);
        if (!next_panel_.compare_exchange_weak(first, last)) continue;
        kernels.multiply(matrix, quantised, first, last, out, out_stride);
        first = next_panel_;
    }
}

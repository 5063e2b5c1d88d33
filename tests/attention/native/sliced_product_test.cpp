// Products in slices against the same dot products in plain loops, bit for bit: types that are converted and such
// that are not, odd shapes, rows that do not follow each other, more threads than there is room for, matrices of a
// file that are given back meanwhile. The two types stand in for ggml's.

#include "sliced_product.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "checks.h"

namespace {

constexpr int32_t kBytes = 20, kWords = 21, kNoDot = 22, kUnknown = 23;

// As ggml declares it.
struct Traits {
    void (*from_float)(const float*, void*, int64_t);
    void (*dot)(int, float*, size_t, const void*, size_t, const void*, size_t, int);
    int32_t dot_type;
    int64_t num_rows;
};

void dot_floats(int count, float* result, size_t, const void* weights, size_t, const void* row, size_t, int) {
    const auto *w = static_cast<const float*>(weights), *x = static_cast<const float*>(row);
    *result = 0;
    for (int i = 0; i < count; ++i) *result += w[i] * x[i];
}

void dot_bytes(int count, float* result, size_t, const void* weights, size_t, const void* row, size_t, int) {
    const auto* w = static_cast<const int8_t*>(weights);
    const auto* x = static_cast<const int16_t*>(row);
    int64_t sum = 0;
    for (int i = 0; i < count; ++i) sum += w[i] * x[i];
    *result = float(sum) / 16;
}

void words_from(const float* from, void* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) static_cast<int16_t*>(to)[i] = int16_t(std::lround(16 * from[i]));
}

const Traits* traits_of(int32_t type) {
    static const Traits floats{nullptr, dot_floats, kGgmlTypeF32, 1}, bytes{nullptr, dot_bytes, kWords, 1};
    static const Traits words{words_from, nullptr, kWords, 1}, none{};
    if (type == kGgmlTypeF32) return &floats;
    if (type == kBytes) return &bytes;
    if (type == kWords) return &words;
    return type == kNoDot ? &none : nullptr;
}

size_t size_of(int32_t type) { return type == kGgmlTypeF32 ? 4 : type == kWords ? 2 : 1; }
size_t row_size(int32_t type, int64_t count) { return size_of(type) * count; }

const ProductFunctions kGgml{reinterpret_cast<void*>(traits_of), reinterpret_cast<void*>(row_size)};

struct Product {
    GgmlTensor matrix{}, rows{}, node{};
    std::vector<char> weights, values, out;  // of exactly their size; `weights` is empty where a map has them
};

void shape(GgmlTensor& tensor, int32_t type, int64_t size, int64_t count, size_t stride) {
    tensor.type = type;
    tensor.ne[0] = size, tensor.ne[1] = count, tensor.ne[2] = tensor.ne[3] = 1;
    tensor.nb[0] = size_of(type), tensor.nb[1] = stride, tensor.nb[2] = tensor.nb[3] = stride * count;
}

size_t padded(size_t num_bytes) { return num_bytes + 4 * pick(0, 3); }

void fill(char* weights, const GgmlTensor& matrix) {
    const int64_t count = matrix.ne[0] * matrix.ne[1];
    for (int64_t i = 0; i < count; ++i) {
        const int value = int(i * 37 % 251) - 125;
        if (matrix.type == kGgmlTypeF32)
            reinterpret_cast<float*>(weights)[i] = 0.01f * value;
        else
            reinterpret_cast<int8_t*>(weights)[i] = int8_t(value);
    }
}

// A product whose matrix still has to be given its place.
Product some_product(int32_t type, int64_t size, int64_t matrix_rows, int64_t num_rows) {
    Product product;
    shape(product.matrix, type, size, matrix_rows, row_size(type, size));
    shape(product.rows, kGgmlTypeF32, size, num_rows, padded(4 * size));
    shape(product.node, kGgmlTypeF32, matrix_rows, num_rows, padded(4 * matrix_rows));
    product.values.resize(product.rows.nb[1] * num_rows), product.out.resize(product.node.nb[1] * num_rows);
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t i = 0; i < size; ++i)
            reinterpret_cast<float*>(product.values.data() + row * product.rows.nb[1])[i] = 0.125f * float(pick(-40, 40));
    product.rows.data = product.values.data(), product.node.data = product.out.data();
    return product;
}

void connect(Product& product) { product.node.src[0] = &product.matrix, product.node.src[1] = &product.rows; }

std::vector<char> expected(const Product& product) {
    const GgmlTensor& matrix = product.matrix;
    std::vector<char> out(product.out.size(), 0x11), words(2 * matrix.ne[0]);
    const Traits& traits = *traits_of(matrix.type);
    for (int64_t i = 0; i < product.rows.ne[1]; ++i) {
        const char* row = product.values.data() + i * product.rows.nb[1];
        if (traits.dot_type == kWords) words_from(reinterpret_cast<const float*>(row), words.data(), matrix.ne[0]);
        for (int64_t j = 0; j < matrix.ne[1]; ++j)
            traits.dot(int(matrix.ne[0]), reinterpret_cast<float*>(out.data() + i * product.node.nb[1]) + j, 0,
                       static_cast<const char*>(matrix.data) + j * matrix.nb[1], 0, traits.dot_type == kWords ? words.data() : row, 0, 1);
    }
    return out;
}

void check(Product& product, const WeightStream& weights, const std::vector<char>& wanted) {
    for (int num_threads : {1, 2, 3}) {
        SlicedProduct sliced;
        require(sliced.can_take(&product.node, kGgml, std::min(num_threads, 2)), "a product is not taken");
        std::fill(product.out.begin(), product.out.end(), 0x11);  // what lies between its rows stays
        on_threads(num_threads, [&](int thread) { sliced.multiply(&product.node, thread, num_threads, weights); });
        require(product.out == wanted, "%d threads: a product of %lld x %lld and %lld rows differs", num_threads,
                (long long)product.matrix.ne[1], (long long)product.matrix.ne[0], (long long)product.rows.ne[1]);
    }
}

void check_shapes(int32_t type) {
    Product product = some_product(type, pick(1, 300), pick(1, 70), pick(0, 8));
    connect(product);
    product.weights.resize(product.matrix.nb[1] * product.matrix.ne[1]);
    fill(product.weights.data(), product.matrix);
    product.matrix.data = product.weights.data();
    check(product, WeightStream(), expected(product));
}

WeightStream stream_of(const Product& product, char* pages, size_t num_page_bytes) {
    const char* begin = static_cast<const char*>(product.matrix.data);
    const WeightSpan span{begin, begin + product.matrix.nb[1] * product.matrix.ne[1], pages, pages + num_page_bytes, 0};
    const uint8_t streamed = 0;
    WeightStream weights;
    require(weights.set(&span, 1, &streamed, 1), "a span is refused");
    return weights;
}

// Several slices for each thread; what one gives back another reads again from the file.
void check_file() {
    Product product = some_product(kBytes, 1999, 2200, 2);
    connect(product);
    const size_t num_bytes = product.matrix.nb[1] * product.matrix.ne[1];
    std::vector<char> weights(num_bytes);
    fill(weights.data(), product.matrix);
    char name[] = "/tmp/lowtide-test-XXXXXX";
    const int file = mkstemp(name);
    require(file >= 0 && unlink(name) == 0 && write(file, weights.data(), num_bytes) == ssize_t(num_bytes), "no file can be written");
    void* pages = mmap(nullptr, num_bytes, PROT_READ, MAP_PRIVATE, file, 0);
    require(pages != MAP_FAILED, "a file is not mapped");
    product.matrix.data = weights.data();
    const std::vector<char> wanted = expected(product);
    product.matrix.data = pages;
    const size_t page_bytes = size_t(sysconf(_SC_PAGESIZE));
    check(product, stream_of(product, static_cast<char*>(pages), num_bytes / page_bytes * page_bytes), wanted);
    munmap(pages, num_bytes);
    close(file);
}

// In memory that is no file's, what was given back is zero: all of it up to the block in which the matrix ends.
void check_given_back() {
    constexpr size_t kBlockBytes = 64 << 10;
    Product product = some_product(kBytes, 1000, 3001, 1);
    connect(product);
    const size_t num_bytes = 50 * kBlockBytes, before = size_t(sysconf(_SC_PAGESIZE));
    void* mapped = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(mapped != MAP_FAILED, "there is no memory");
    char* memory = static_cast<char*>(mapped);
    std::memset(memory, 1, num_bytes);
    product.matrix.data = memory + before;
    const std::vector<char> wanted = expected(product);
    SlicedProduct sliced;
    require(sliced.can_take(&product.node, kGgml, 1), "a product is not taken");
    std::fill(product.out.begin(), product.out.end(), 0x11);
    sliced.multiply(&product.node, 0, 1, stream_of(product, memory + before, num_bytes - before));
    require(product.out == wanted, "a product of memory that is given back differs");
    const auto end = reinterpret_cast<uintptr_t>(memory) + before + product.matrix.nb[1] * product.matrix.ne[1];
    for (size_t at = 0; at < num_bytes; at += 512) {
        const bool gone = at >= before && reinterpret_cast<uintptr_t>(memory) + at < end / kBlockBytes * kBlockBytes;
        require(memory[at] == (gone ? 0 : 1), "byte %zu is %s", at, gone ? "still there" : "gone");
    }
    munmap(mapped, num_bytes);
}

void check_refused() {
    const auto takes = [](void (*change)(Product&)) {
        Product product = some_product(kBytes, 64, 10, 2);
        connect(product);
        change(product);
        return SlicedProduct().can_take(&product.node, kGgml, 2);
    };
    require(takes([](Product&) {}), "a product is not taken");
    void (*const changes[])(Product&) = {
        [](Product& p) { p.rows.ne[1] = p.node.ne[1] = 9; },
        [](Product& p) { p.rows.ne[0] = 63; },
        [](Product& p) { p.node.ne[0] = 9; },
        [](Product& p) { p.node.ne[1] = 1; },
        [](Product& p) { p.matrix.ne[2] = 2; },
        [](Product& p) { p.rows.ne[3] = 2; },
        [](Product& p) { p.node.ne[2] = 2; },
        [](Product& p) { p.matrix.nb[1] = 65; },
        [](Product& p) { p.rows.nb[0] = 8; },
        [](Product& p) { p.node.nb[0] = 8; },
        [](Product& p) { p.rows.type = kGgmlTypeF16; },
        [](Product& p) { p.node.type = kGgmlTypeF16; },
        [](Product& p) { p.matrix.type = kUnknown; },
        [](Product& p) { p.matrix.type = kNoDot; },
        [](Product& p) { p.node.src[1] = nullptr; },
    };
    int number = 0;
    for (const auto change : changes) require(!takes(change), "a product of another kind is taken, number %d", number), ++number;
}

}  // namespace

int main() {
    int num_checked = 0;
    for (; num_checked < 60; ++num_checked) check_shapes(num_checked % 2 == 0 ? kGgmlTypeF32 : kBytes);
    check_file();
    check_given_back();
    check_refused();
    std::printf("%d products agree\n", num_checked + 2);
    return 0;
}

// Streamed matmuls against the same dot products in plain loops, bitwise: types that are converted and types that are
// not, odd shapes, rows with gaps between them, more threads than reserved, and matrices of a file that are released
// meanwhile. Two simple types stand in for ggml's.

#include "llama/weights/weight_streaming.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "checks.h"

namespace {

constexpr int32_t kBytes = 20, kWords = 21, kNoDot = 22, kUnknown = 23;

// ggml_type_traits_cpu.
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

const GgmlMatmulFunctions kGgml{reinterpret_cast<void*>(traits_of), reinterpret_cast<void*>(row_size)};

struct Matmul {
    GgmlTensor matrix{}, rows{}, node{};
    std::vector<char> weights, values, out;  // of exactly the needed size; `weights` is empty if the matrix is in a map
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

// A matmul whose matrix has no data yet.
Matmul random_matmul(int32_t type, int64_t size, int64_t matrix_rows, int64_t num_rows) {
    Matmul matmul;
    shape(matmul.matrix, type, size, matrix_rows, row_size(type, size));
    shape(matmul.rows, kGgmlTypeF32, size, num_rows, padded(4 * size));
    shape(matmul.node, kGgmlTypeF32, matrix_rows, num_rows, padded(4 * matrix_rows));
    matmul.values.resize(matmul.rows.nb[1] * num_rows), matmul.out.resize(matmul.node.nb[1] * num_rows);
    for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t i = 0; i < size; ++i)
            reinterpret_cast<float*>(matmul.values.data() + row * matmul.rows.nb[1])[i] = 0.125f * float(pick(-40, 40));
    matmul.rows.data = matmul.values.data(), matmul.node.data = matmul.out.data();
    return matmul;
}

void connect(Matmul& matmul) { matmul.node.src[0] = &matmul.matrix, matmul.node.src[1] = &matmul.rows; }

std::vector<char> expected(const Matmul& matmul) {
    const GgmlTensor& matrix = matmul.matrix;
    std::vector<char> out(matmul.out.size(), 0x11), words(2 * matrix.ne[0]);
    const Traits& traits = *traits_of(matrix.type);
    for (int64_t i = 0; i < matmul.rows.ne[1]; ++i) {
        const char* row = matmul.values.data() + i * matmul.rows.nb[1];
        if (traits.dot_type == kWords) words_from(reinterpret_cast<const float*>(row), words.data(), matrix.ne[0]);
        for (int64_t j = 0; j < matrix.ne[1]; ++j)
            traits.dot(int(matrix.ne[0]), reinterpret_cast<float*>(out.data() + i * matmul.node.nb[1]) + j, 0,
                       static_cast<const char*>(matrix.data) + j * matrix.nb[1], 0, traits.dot_type == kWords ? words.data() : row, 0, 1);
    }
    return out;
}

void check(Matmul& matmul, const WeightStream& weights, const std::vector<char>& reference) {
    for (int num_threads : {1, 2, 3}) {
        StreamedMatmul streamed;
        require(streamed.can_replace(&matmul.node, kGgml, std::min(num_threads, 2)), "a matmul is refused");
        std::fill(matmul.out.begin(), matmul.out.end(), 0x11);  // the space between its rows stays as it is
        on_threads(num_threads, [&](int thread) { streamed.multiply(&matmul.node, thread, num_threads, weights); });
        require(matmul.out == reference, "%d threads: the matmul of %lld x %lld and %lld rows differs", num_threads,
                (long long)matmul.matrix.ne[1], (long long)matmul.matrix.ne[0], (long long)matmul.rows.ne[1]);
    }
}

void check_shapes(int32_t type) {
    Matmul matmul = random_matmul(type, pick(1, 300), pick(1, 70), pick(0, 8));
    connect(matmul);
    matmul.weights.resize(matmul.matrix.nb[1] * matmul.matrix.ne[1]);
    fill(matmul.weights.data(), matmul.matrix);
    matmul.matrix.data = matmul.weights.data();
    check(matmul, WeightStream(), expected(matmul));
}

WeightStream stream_of(const Matmul& matmul, char* pages, size_t num_page_bytes) {
    const char* begin = static_cast<const char*>(matmul.matrix.data);
    const WeightSpan span{begin, begin + matmul.matrix.nb[1] * matmul.matrix.ne[1], pages, pages + num_page_bytes, 0};
    const uint8_t streamed = 0;
    WeightStream weights;
    require(weights.set(&span, 1, &streamed, 1), "a span is refused");
    return weights;
}

// Several slices per thread. What one thread releases, another reads again from the file.
void check_file() {
    Matmul matmul = random_matmul(kBytes, 1999, 2200, 2);
    connect(matmul);
    const size_t num_bytes = matmul.matrix.nb[1] * matmul.matrix.ne[1];
    std::vector<char> weights(num_bytes);
    fill(weights.data(), matmul.matrix);
    char name[] = "/tmp/lowtide-test-XXXXXX";
    const int file = mkstemp(name);
    require(file >= 0 && unlink(name) == 0 && write(file, weights.data(), num_bytes) == ssize_t(num_bytes), "no file can be written");
    void* pages = mmap(nullptr, num_bytes, PROT_READ, MAP_PRIVATE, file, 0);
    require(pages != MAP_FAILED, "a file is not mapped");
    matmul.matrix.data = weights.data();
    const std::vector<char> reference = expected(matmul);
    matmul.matrix.data = pages;
    const size_t page_bytes = size_t(sysconf(_SC_PAGESIZE));
    check(matmul, stream_of(matmul, static_cast<char*>(pages), num_bytes / page_bytes * page_bytes), reference);
    munmap(pages, num_bytes);
    close(file);
}

// In anonymous memory, what was released is zero: all of it up to the block in which the matrix ends.
void check_released() {
    constexpr size_t kBlockBytes = 64 << 10;
    Matmul matmul = random_matmul(kBytes, 1000, 3001, 1);
    connect(matmul);
    const size_t num_bytes = 50 * kBlockBytes, before = size_t(sysconf(_SC_PAGESIZE));
    void* mapped = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(mapped != MAP_FAILED, "there is no memory");
    char* memory = static_cast<char*>(mapped);
    std::memset(memory, 1, num_bytes);
    matmul.matrix.data = memory + before;
    const std::vector<char> reference = expected(matmul);
    StreamedMatmul streamed;
    require(streamed.can_replace(&matmul.node, kGgml, 1), "a matmul is refused");
    std::fill(matmul.out.begin(), matmul.out.end(), 0x11);
    streamed.multiply(&matmul.node, 0, 1, stream_of(matmul, memory + before, num_bytes - before));
    require(matmul.out == reference, "a matmul of memory that is released differs");
    const auto end = reinterpret_cast<uintptr_t>(memory) + before + matmul.matrix.nb[1] * matmul.matrix.ne[1];
    for (size_t at = 0; at < num_bytes; at += 512) {
        const bool gone = at >= before && reinterpret_cast<uintptr_t>(memory) + at < end / kBlockBytes * kBlockBytes;
        require(memory[at] == (gone ? 0 : 1), "byte %zu is %s", at, gone ? "still there" : "gone");
    }
    munmap(mapped, num_bytes);
}

void check_refused() {
    const auto takes = [](void (*change)(Matmul&)) {
        Matmul matmul = random_matmul(kBytes, 64, 10, 2);
        connect(matmul);
        change(matmul);
        return StreamedMatmul().can_replace(&matmul.node, kGgml, 2);
    };
    require(takes([](Matmul&) {}), "a matmul is refused");
    void (*const changes[])(Matmul&) = {
        [](Matmul& p) { p.rows.ne[1] = p.node.ne[1] = 9; },
        [](Matmul& p) { p.rows.ne[0] = 63; },
        [](Matmul& p) { p.node.ne[0] = 9; },
        [](Matmul& p) { p.node.ne[1] = 1; },
        [](Matmul& p) { p.matrix.ne[2] = 2; },
        [](Matmul& p) { p.rows.ne[3] = 2; },
        [](Matmul& p) { p.node.ne[2] = 2; },
        [](Matmul& p) { p.matrix.nb[1] = 65; },
        [](Matmul& p) { p.rows.nb[0] = 8; },
        [](Matmul& p) { p.node.nb[0] = 8; },
        [](Matmul& p) { p.rows.type = kGgmlTypeF16; },
        [](Matmul& p) { p.node.type = kGgmlTypeF16; },
        [](Matmul& p) { p.matrix.type = kUnknown; },
        [](Matmul& p) { p.matrix.type = kNoDot; },
        [](Matmul& p) { p.node.src[1] = nullptr; },
    };
    int number = 0;
    for (const auto change : changes) require(!takes(change), "an unsupported matmul is accepted, number %d", number), ++number;
}

}  // namespace

int main() {
    int num_checked = 0;
    for (; num_checked < 60; ++num_checked) check_shapes(num_checked % 2 == 0 ? kGgmlTypeF32 : kBytes);
    check_file();
    check_released();
    check_refused();
    std::printf("%d matmuls agree\n", num_checked + 2);
    return 0;
}

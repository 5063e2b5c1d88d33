// Random spans of weights, some of which touch, are empty or share a page, and random nodes that read them: which
// pages are released, against plain loops over all spans. The memory is anonymous, so a released page is zero.

#include "llama/weights/weight_streaming.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <set>
#include <vector>

#include "checks.h"

namespace {

const size_t kPageBytes = size_t(sysconf(_SC_PAGESIZE));
constexpr size_t kBlockBytes = 64 << 10;
constexpr int kNumPages = 96;
constexpr char kFilled = 0x5a;

size_t page_of(const char* memory, const char* at) { return size_t(at - memory) / kPageBytes; }
size_t round_down(size_t offset, size_t unit) { return offset / unit * unit; }

struct Spans {
    char* memory;
    std::vector<WeightSpan> all;
    std::vector<uint8_t> keep_resident;

    // Plain loops to compare with.
    const WeightSpan* around(const void* data) const {
        for (const WeightSpan& span : all)
            if (span.begin <= data && data < span.end) return &span;
        return nullptr;
    }
    int group_of(const void* data) const { return around(data) == nullptr ? -1 : around(data)->group; }

    std::set<size_t> pages_of(int group) const {
        std::set<size_t> pages;
        for (const WeightSpan& span : all)
            for (const char* at = span.page_begin; span.group == group && at < span.page_end; at += kPageBytes)
                pages.insert(page_of(memory, at));
        return pages;
    }
    int64_t bytes_of(int group) const {
        int64_t num_bytes = 0;
        for (const WeightSpan& span : all) num_bytes += span.group == group ? span.page_end - span.page_begin : 0;
        return num_bytes;
    }
};

WeightSpan span_at(char* memory, size_t begin, size_t end, int group) {
    return {memory + begin, memory + end, memory + round_down(begin, kPageBytes), memory + round_down(end + kPageBytes - 1, kPageBytes),
            group};
}

// Spans in order; a third of them touch the one before, some are empty.
Spans random_spans(char* memory, int num_groups) {
    Spans spans{memory, {}, {}};
    for (int group = 0; group < num_groups; ++group) spans.keep_resident.push_back(pick(0, 3) == 0);
    size_t at = pick(0, 5000);
    while (true) {
        at += pick(0, 2) == 0 ? 0 : pick(1, 12000);
        const size_t end = at + (pick(0, 7) == 0 ? 0 : pick(1, 20000));
        if (end > kNumPages * kPageBytes) return spans;
        spans.all.push_back(span_at(memory, at, end, pick(0, num_groups - 1)));
        at = end;
    }
}

// A node whose sources begin, lie in, end or lie beside some spans; some sources are null.
struct Node {
    GgmlTensor tensor{}, sources[10]{};
};

void read_somewhere(Node& node, const Spans& spans) {
    for (int i = 0; i < 10; ++i) {
        node.tensor.src[i] = pick(0, 2) == 0 ? &node.sources[i] : nullptr;
        const WeightSpan& span = spans.all[pick(0, int(spans.all.size()) - 1)];
        const char* places[] = {span.begin, span.end, span.begin + (span.end - span.begin) / 2, nullptr};
        node.sources[i].data = const_cast<char*>(places[pick(0, 3)]);
    }
}

void fill(const Spans& spans, int group, std::vector<bool>& filled) {
    for (size_t page : spans.pages_of(group)) {
        std::memset(spans.memory + page * kPageBytes, kFilled, kPageBytes);
        filled[page] = true;
    }
}

void check_pages(const Spans& spans, const std::vector<bool>& filled) {
    for (size_t page = 0; page < kNumPages; ++page)
        for (size_t at : {size_t(0), kPageBytes - 1})
            require(spans.memory[page * kPageBytes + at] == (filled[page] ? kFilled : 0), "page %zu is %s", page,
                    filled[page] ? "gone" : "still there");
}

void check_graph(char* memory) {
    const int num_groups = pick(1, 6);
    const Spans spans = random_spans(memory, num_groups);
    WeightStream stream;
    require(stream.set(spans.all.data(), int(spans.all.size()), spans.keep_resident.data(), num_groups), "spans in order are refused");
    std::vector<bool> filled(kNumPages);
    std::set<int> resident;
    int64_t freed = 0;
    for (int step = 0, current = -1; step < 40; ++step) {
        Node node;
        read_somewhere(node, spans);
        std::set<int> read;
        const int before = current;
        for (const GgmlTensor* source : node.tensor.src) {
            const int group = source == nullptr ? -1 : spans.group_of(source->data);
            if (group >= 0) read.insert(group), resident.insert(group), current = group;
        }
        require(stream.enters_group(&node.tensor) == (current != before), "step %d: entering a group is not reported", step);
        for (int group : read) fill(spans, group, filled);
        if (pick(0, 1) == 0) continue;
        stream.release_others(&node.tensor);
        for (int group = 0; group < num_groups; ++group) {
            if (resident.count(group) == 0 || spans.keep_resident[group] || read.count(group) != 0) continue;
            for (size_t page : spans.pages_of(group)) filled[page] = false;
            freed += spans.bytes_of(group);
            resident.erase(group);
        }
        check_pages(spans, filled);
        require(stream.freed_bytes() == freed, "%lld bytes are counted, %lld were released",
                (long long)stream.freed_bytes(), (long long)freed);
    }
}

void check_streamed_alone(char* memory) {
    const Spans spans = random_spans(memory, 3);
    WeightStream stream;
    require(stream.set(spans.all.data(), int(spans.all.size()), spans.keep_resident.data(), 3), "spans in order are refused");
    for (const WeightSpan& span : spans.all)
        for (int i = 0; i < 4; ++i) {
            const char *begin = span.begin + i % 2, *end = span.end + i / 2;
            if (end < begin) continue;
            GgmlTensor weight{};
            weight.data = const_cast<char*>(begin);
            weight.ne[1] = 1, weight.nb[1] = end - begin;
            const WeightSpan* found = spans.around(begin);
            const bool alone = found != nullptr && !spans.keep_resident[found->group] && found->begin == begin && found->end == end;
            require(stream.is_streamed_alone(&weight) == alone, "a weight of %zu bytes is%s alone", weight.nb[1], alone ? " not" : "");
        }
}

// A part of one weight: from the block around its begin to the block around its end, inside the span's pages.
void check_parts(char* memory) {
    const WeightSpan span = span_at(memory, pick(0, 70000), pick(150000, 300000), 0);
    const uint8_t streamed = 0;
    WeightStream stream;
    require(stream.set(&span, 1, &streamed, 1), "one span is refused");
    for (int i = 0; i < 20; ++i) {
        std::memset(memory, kFilled, kNumPages * kPageBytes);
        const char* begin = span.begin + pick(0, int(span.end - span.begin) - 1);
        const char* end = begin + pick(0, int(span.end - begin));
        stream.release_pages(begin, end);
        const auto first = round_down(reinterpret_cast<uintptr_t>(begin), kBlockBytes),
                   last = round_down(reinterpret_cast<uintptr_t>(end), kBlockBytes);
        for (char* at = memory; at < memory + kNumPages * kPageBytes; at += kPageBytes) {
            const auto address = reinterpret_cast<uintptr_t>(at);
            const bool gone = first <= address && address < last && span.page_begin <= at && at < span.page_end;
            require(*at == (gone ? 0 : kFilled), "page %zu of a part is %s", page_of(memory, at), gone ? "still there" : "gone");
        }
    }
    std::memset(memory, kFilled, kNumPages * kPageBytes);
    stream.release_pages(span.end, span.end + kBlockBytes);
    require(memory[page_of(memory, span.end) * kPageBytes] == kFilled, "memory behind all spans is released");
}

// Nothing changes if the arguments are invalid.
void check_refused(char* memory) {
    const WeightSpan first = span_at(memory, 0, 5000, 0), second = span_at(memory, 5000, 9000, 1);
    const uint8_t keep_resident[] = {0, 0};
    WeightStream stream;
    Node node;
    node.tensor.src[0] = &node.sources[0], node.sources[0].data = memory;
    require(stream.set(nullptr, 0, nullptr, 0) && !stream.enters_group(&node.tensor), "nothing is entered");
    const WeightSpan good[] = {first, second}, swapped[] = {second, first}, twice[] = {first, first};
    require(stream.set(good, 2, keep_resident, 2) && stream.enters_group(&node.tensor), "entering a group is not reported");
    WeightSpan backwards[] = {first}, nowhere[] = {first};
    std::swap(backwards[0].begin, backwards[0].end), nowhere[0].group = -1;
    require(!stream.set(swapped, 2, keep_resident, 2) && !stream.set(twice, 2, keep_resident, 2) &&
                !stream.set(good, 2, keep_resident, 1) && !stream.set(backwards, 1, keep_resident, 2) &&
                !stream.set(nowhere, 1, keep_resident, 2),
            "invalid spans are accepted");
    require(!stream.enters_group(&node.tensor), "invalid spans have changed something");
    node.sources[0].data = memory + 5000;
    require(stream.enters_group(&node.tensor), "the second of two spans that touch is not found");
    require(stream.set(good, 2, keep_resident, 2) && stream.enters_group(&node.tensor), "new spans keep the current group of the old ones");
}

}  // namespace

int main() {
    const size_t num_bytes = kNumPages * kPageBytes;
    int num_checked = 0;
    for (; num_checked < 60; ++num_checked) {
        void* mapped = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        require(mapped != MAP_FAILED, "there is no memory");
        char* memory = static_cast<char*>(mapped);
        check_graph(memory);
        check_streamed_alone(memory);
        check_parts(memory);
        check_refused(memory);
        munmap(mapped, num_bytes);
    }
    std::printf("%d streams agree\n", num_checked);
    return 0;
}

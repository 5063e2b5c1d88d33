// Random graphs whose weights have the tensor names of a GGUF file, views of weights, and similar names: where the
// timer stops, and that each layer's end is between two readings of the test's own clock.

#include "llama/layer_timer.h"

#include <chrono>
#include <cstring>
#include <memory>
#include <vector>

#include "checks.h"

namespace {

constexpr int kNone = -1, kOutput = kMaxLayers;
using Clock = std::chrono::steady_clock;

int64_t between(Clock::time_point begin, Clock::time_point end) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(end - begin).count();
}

// A tensor that a node reads, and the layer that its name means.
struct Source {
    GgmlTensor tensor{}, weight{};
    int layer = kNone;
};

void name(GgmlTensor& tensor, const char* words, int number) { std::snprintf(tensor.name, sizeof tensor.name, words, number); }

void become_weight(Source& source, int layer) {
    GgmlTensor& named = pick(0, 2) == 0 ? source.weight : source.tensor;
    if (&named == &source.weight) source.tensor.view_src = &source.weight, name(source.tensor, "blk.%d (view)", 1);
    source.layer = layer;
    if (layer == kOutput)
        name(named, pick(0, 1) == 0 ? "output.weight" : "output_norm.weight", 0);
    else
        name(named, pick(0, 1) == 0 ? "blk.%d.attn_q.weight" : "blk.%d.ffn_down.weight", layer);
}

void become_another(Source& source) {
    constexpr const char* kWords[] = {
        "blk.-%d.attn_q.weight", "blk.x%d.weight", "output%d", "token_embd.weight", "cache_k_l%d (view)", "", "blk."};
    name(source.tensor, kWords[pick(0, 6)], pick(1, 9));
    if (pick(0, 5) == 0) name(source.tensor, "blk.%d.attn_q.weight", kMaxLayers + pick(0, 5));
}

struct Node {
    GgmlTensor tensor{};
    Source sources[10];
    int layer = kNone;  // of the first source with a layer
};

Node* some_node(int layer) {
    auto* node = new Node();
    const int from = pick(0, 9);
    for (int i = 0; i < 10; ++i) {
        if (i == from && layer != kNone)
            become_weight(node->sources[i], layer);
        else if (pick(0, 1) == 0)
            become_another(node->sources[i]);
        else
            continue;
        node->tensor.src[i] = &node->sources[i].tensor;
    }
    node->layer = layer;
    return node;
}

// Layers come in order, but some nodes read an earlier one.
void check_graph(LayerTimer& timer) {
    std::vector<int> expected_order;
    const int first = pick(0, 3), step = pick(1, 40), num_layers = pick(1, 12);
    for (int i = 0; i < num_layers; ++i) expected_order.push_back(first + i * step);
    if (pick(0, 3) != 0) expected_order.push_back(kOutput);
    std::vector<int64_t> least(kMaxLayers), most(kMaxLayers), attention(kMaxLayers);
    const auto before_start = Clock::now();
    timer.start_pass(true);
    const auto after_start = Clock::now();
    int current = kNone;
    for (int layer : expected_order)
        for (int i = pick(1, 5); i > 0; --i) {
            const bool again = i > 1 && pick(0, 3) == 0;
            const std::unique_ptr<Node> node(some_node(i == 1 ? layer : again ? first : kNone));
            const bool ends_one = node->layer > current && current != kNone;
            require(timer.should_stop(&node->tensor) == ends_one, "layer %d after %d: the timer %s", node->layer, current,
                    ends_one ? "goes on" : "stops");
            if (!ends_one && pick(0, 1) == 0) require(timer.on_stop(), "a stop for another reason ends the pass");
            if (ends_one) {
                const auto before = Clock::now();
                require(timer.on_stop(), "the pass does not go on");
                least[current] = between(after_start, before), most[current] = between(before_start, Clock::now());
            }
            current = std::max(current, node->layer);
            if (current == kOutput || current == kNone) continue;
            timer.add_attention(current, i);
            attention[current] += i;
        }
    std::unique_ptr<int64_t[]> ends(new int64_t[kMaxLayers]), attention_read(new int64_t[kMaxLayers]);
    lowtide_timer_read(&timer, ends.get(), attention_read.get(), kMaxLayers + 8);
    for (int layer = 0; layer < kMaxLayers; ++layer) {
        require(least[layer] <= ends[layer] && ends[layer] <= most[layer], "layer %d ends at %lld, but it ended between %lld and %lld",
                layer, (long long)ends[layer], (long long)least[layer], (long long)most[layer]);
        require(attention_read[layer] == attention[layer], "layer %d: %lld ns of attention, %lld were added", layer,
                (long long)attention_read[layer], (long long)attention[layer]);
    }
}

void check_untimed(LayerTimer& timer) {
    int64_t ends[3] = {}, attention[3] = {}, before[3] = {}, unused[3];
    lowtide_timer_read(&timer, before, unused, 3);
    lowtide_timer_start(&timer, 0);
    for (int layer = 0; layer < 3; ++layer) {
        const std::unique_ptr<Node> node(some_node(layer));
        require(!timer.should_stop(&node->tensor) && timer.on_stop(), "an untimed pass is timed");
    }
    lowtide_timer_read(&timer, ends, attention, 3);
    require(std::memcmp(ends, before, sizeof ends) == 0, "an untimed pass has times");
    lowtide_timer_start(&timer, 1);
    lowtide_timer_read(&timer, ends, attention, 3);
    for (int layer = 0; layer < 3; ++layer) require(ends[layer] == 0 && attention[layer] == 0, "a new pass has times of the last one");
}

}  // namespace

int main() {
    const std::unique_ptr<LayerTimer> timer(new LayerTimer());
    int num_checked = 0;
    for (; num_checked < 200; ++num_checked) {
        check_graph(*timer);
        check_untimed(*timer);
    }
    std::printf("%d passes agree\n", num_checked);
    return 0;
}

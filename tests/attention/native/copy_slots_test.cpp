// Random caches of every type, with contiguous and separate heads: copying a slot copies it byte for byte and changes
// nothing else, and slots that do not exist are not touched.

#include "llama/batch.h"

#include <cstring>
#include <vector>

#include "checks.h"

namespace {

// Rows of heads, with unused space between slots and between heads.
struct Cache {
    int num_slots, num_heads, size;
    KvType type;
    size_t head_stride, slot_stride;
    std::vector<char> bytes;

    Cache(int slots, int heads) : num_slots(slots), num_heads(heads), size(32 * pick(1, 4)), type(KvType(pick(0, 3))) {
        head_stride = stored_bytes(type, size) + pick(0, 2) * 4;
        slot_stride = head_stride * heads + pick(0, 2) * 8;
        bytes.resize(slot_stride * slots);
        for (char& byte : bytes) byte = char(pick(-128, 127));
    }

    char* vector(int slot, int head) { return bytes.data() + slot * slot_stride + head * head_stride; }

    void copy(int from, int to) {
        for (int head = 0; head < num_heads; ++head) std::memmove(vector(to, head), vector(from, head), stored_bytes(type, size));
    }
};

AttentionProblem problem_of(Cache& keys, Cache& values) {
    AttentionProblem p{};
    p.k = keys.bytes.data(), p.k_key_stride = keys.slot_stride, p.k_head_stride = keys.head_stride, p.k_type = keys.type;
    p.v = values.bytes.data(), p.v_key_stride = values.slot_stride, p.v_head_stride = values.head_stride, p.v_type = values.type;
    p.num_kv_heads = keys.num_heads, p.num_keys = keys.num_slots, p.key_dim = keys.size, p.value_dim = values.size;
    return p;
}

void copies_are_exact() {
    const int slots = pick(1, 9), heads = pick(1, 4);
    Cache keys(slots, heads), values(slots, heads);
    LayerSlots layer;
    require(!layer.copy(0, 0), "a slot was copied before there were any");
    layer.set(problem_of(keys, values));
    Cache expected_keys = keys, expected_values = values;
    const int from = pick(0, slots - 1), to = pick(0, slots - 1);
    expected_keys.copy(from, to), expected_values.copy(from, to);
    require(layer.copy(from, to), "slot %d was not copied to %d of %d", from, to, slots);
    for (const int nowhere : {-1, slots, slots + 1000})
        require(!layer.copy(nowhere, to) && !layer.copy(from, nowhere), "slot %d of %d was copied", nowhere, slots);
    require(keys.bytes == expected_keys.bytes && values.bytes == expected_values.bytes, "bytes outside of the slot changed");
    layer.clear();
    require(!layer.copy(from, to), "a slot was copied after clear");
}

}  // namespace

int main() {
    for (int i = 0; i < 2000; ++i) copies_are_exact();
    std::printf("2000 copies of slots agree\n");
}

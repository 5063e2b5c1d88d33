// Random caches of every type, with heads side by side and not: a copied cell is the other one, byte for byte, nothing
// else changes, and cells that are not there are not touched.

#include "layer_cells.h"

#include <cstring>
#include <vector>

#include "checks.h"

namespace {

// Rows of heads, with room between cells and between heads that belongs to nobody.
struct Cache {
    int num_cells, num_heads, size;
    KvType type;
    size_t head_stride, cell_stride;
    std::vector<char> bytes;

    Cache(int cells, int heads) : num_cells(cells), num_heads(heads), size(32 * pick(1, 4)), type(KvType(pick(0, 3))) {
        head_stride = stored_bytes(type, size) + pick(0, 2) * 4;
        cell_stride = head_stride * heads + pick(0, 2) * 8;
        bytes.resize(cell_stride * cells);
        for (char& byte : bytes) byte = char(pick(-128, 127));
    }

    char* row(int cell, int head) { return bytes.data() + cell * cell_stride + head * head_stride; }

    void copy(int from, int to) {
        for (int head = 0; head < num_heads; ++head) std::memmove(row(to, head), row(from, head), stored_bytes(type, size));
    }
};

AttentionProblem problem_of(Cache& keys, Cache& values) {
    AttentionProblem p{};
    p.k = keys.bytes.data(), p.k_key_stride = keys.cell_stride, p.k_head_stride = keys.head_stride, p.k_type = keys.type;
    p.v = values.bytes.data(), p.v_key_stride = values.cell_stride, p.v_head_stride = values.head_stride, p.v_type = values.type;
    p.num_kv_heads = keys.num_heads, p.num_keys = keys.num_cells, p.key_size = keys.size, p.value_size = values.size;
    return p;
}

void copies_are_exact() {
    const int cells = pick(1, 9), heads = pick(1, 4);
    Cache keys(cells, heads), values(cells, heads);
    LayerCells layer;
    require(!layer.copy(0, 0), "a cell was copied before there were any");
    layer.set(problem_of(keys, values));
    Cache expected_keys = keys, expected_values = values;
    const int from = pick(0, cells - 1), to = pick(0, cells - 1);
    expected_keys.copy(from, to), expected_values.copy(from, to);
    require(layer.copy(from, to), "cell %d was not copied to %d of %d", from, to, cells);
    for (const int nowhere : {-1, cells, cells + 1000})
        require(!layer.copy(nowhere, to) && !layer.copy(from, nowhere), "cell %d of %d was copied", nowhere, cells);
    require(keys.bytes == expected_keys.bytes && values.bytes == expected_values.bytes, "other bytes than the cell's changed");
    layer.clear();
    require(!layer.copy(from, to), "a cell was copied after they were forgotten");
}

}  // namespace

int main() {
    for (int i = 0; i < 2000; ++i) copies_are_exact();
    std::printf("2000 copies of cells agree\n");
}

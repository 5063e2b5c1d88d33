"""Which products of a graph have a packed form, and that their rows in ggml's blocks say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_decoders import Shape, write_decoder
from tiny_gguf import write_pair

from lowtide.models.convert.convert import convert
from lowtide.models.errors import BadModelFile
from lowtide.models.onnx.graph import read_graph
from lowtide.models.onnx.read_spec import RepackPlan
from lowtide.models.onnx.rewrite.matmul_nodes import BlockWeights, read_matmul_nodes
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.read_spec import read_spec

LAYER = 7
"""Products of a layer: queries, keys, values, what joins them, and three of the feed-forward part."""
WIDE = Shape(width=256, heads=4, kv_heads=4, feed_forward=128)


def repack_plan(folder: Path) -> RepackPlan | str:
    spec = read_spec(folder)
    assert isinstance(spec, OnnxSpec)
    return spec.packed


def dequantised(matrix: BlockWeights, folder: Path) -> np.ndarray:
    """By gguf, the library that knows ggml's blocks."""
    rows = np.concatenate(list(matrix.ggml_rows(folder, 16)))
    assert rows.nbytes == matrix.num_bytes
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[matrix.type_name])


def stated(matrix: BlockWeights, folder: Path) -> np.ndarray:
    """(quant - zero point) * scale, as onnxruntime's documentation has MatMulNBits."""
    model = onnx.load(str(folder / "model.onnx"))
    weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    bits, rows, blocks = matrix.bits, matrix.num_rows, matrix.num_columns // matrix.block_size
    packed = weights[matrix.quants.name].reshape(rows, blocks, -1)
    halves = [packed] if bits == 8 else [packed & 15, packed >> 4]
    quants = np.stack(halves, axis=-1).reshape(rows, blocks, -1).astype(np.float32)
    zeros: Any = 1 << (bits - 1)
    if matrix.zeros is not None:
        points = weights[matrix.zeros.name].reshape(rows, -1)
        both = np.stack([points & 15, points >> 4], axis=-1).reshape(rows, -1)
        zeros = both[:, :blocks, None].astype(np.float32)
    scales = weights[matrix.scales.name].reshape(rows, blocks, 1)
    return ((quants - zeros) * scales).reshape(rows, -1)


@pytest.mark.parametrize(
    ("written", "type_name"),
    [
        ({"bits": 4}, "Q4_0"),
        ({"bits": 4, "block_size": 64}, "Q4_0"),
        ({"bits": 4, "symmetric": False}, "Q4_1"),
        ({"bits": 4, "symmetric": False, "block_size": 64}, "Q4_1"),
        ({"bits": 8}, "Q8_0"),
    ],
    ids=str,
)
def test_every_product_keeps_its_weights(
    tmp_path: Path, written: dict[str, Any], type_name: str
) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", WIDE, **written)
    form = repack_plan(folder)
    assert isinstance(form, RepackPlan)
    products = form.swap.products
    assert len(products.products) == len(products.matrices) == WIDE.layers * LAYER + 1
    for matrix in products.matrices:
        assert matrix.type_name == type_name
        wanted = stated(matrix, folder)
        found = dequantised(matrix, folder)
        assert np.abs(found - wanted).max() <= 1e-3 * np.abs(wanted).max()
        assert np.abs(wanted).max() > 0.1
    read = {weight.name for m in products.matrices for weight in (m.quants, m.scales)}
    assert not read & form.swap.weights, "onnxruntime keeps what it does not read"


@pytest.mark.parametrize(
    ("shape", "written"),
    [
        (WIDE, {}),
        (WIDE, {"bits": 4, "block_size": 16}),
        (WIDE, {"bits": 8, "symmetric": False}),
        (Shape(width=48, heads=3, kv_heads=3, feed_forward=40, vocabulary=321), {"bits": 4}),
    ],
    ids=["floats", "blocks of 16", "8 bits with zero points", "odd sizes"],
)
def test_what_has_no_packed_form_stays_and_is_told(
    tmp_path: Path, shape: Shape, written: dict[str, Any]
) -> None:
    form = repack_plan(write_decoder(tmp_path / "tiny", "gqa", shape, **written))
    assert form == "has no product of 4- or 8-bit weights in blocks of 32 that can be packed"


def test_a_graph_that_keeps_its_attention_keeps_its_products(tmp_path: Path) -> None:
    form = repack_plan(write_decoder(tmp_path / "tiny", "decomposed", WIDE, bits=4))
    assert form == "has decomposed attention"


@pytest.mark.parametrize(
    ("architecture", "kind", "tied", "num_packed", "num_looked_up"),
    [
        ("llama", "Q4_0", True, 50, 1),
        ("llama", "Q4_1", True, 50, 0),
        ("gemma3", "Q8_0", True, 50, 1),
        ("qwen2", "Q4_0", False, 50, 0),
        ("llama", "Q5_0", True, 50, 1),
    ],
)
def test_converted_folders_keep_the_models_very_weights(
    tmp_path: Path, architecture: str, kind: str, tied: bool, num_packed: int, num_looked_up: int
) -> None:
    """Offsets that the graph adds on its own are a block's minimum again; an embedding of its own stays."""
    quantised, exact = write_pair(tmp_path, architecture, kind, tied=tied)
    folder = convert(read_spec(quantised), tmp_path / "onnx").folder
    products = read_matmul_nodes(read_graph(folder / "model.onnx"))
    assert len(products.products) == num_packed and len(products.gathers) == num_looked_up
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(exact).tensors}
    for matrix in products.matrices:
        name = matrix.quants.name.removesuffix(".quants")
        wanted, found = tensors[name].data, dequantised(matrix, folder)
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            wanted, found = (
                np.sort(rows, axis=0) for rows in (wanted, found)
            )  # heads are unpaired
        np.testing.assert_array_equal(found, wanted)


def test_offsets_in_8_bits_stay_with_the_graph(tmp_path: Path) -> None:
    quantised, _ = write_pair(tmp_path, "llama", "Q5_1")
    folder = convert(read_spec(quantised), tmp_path / "onnx").folder
    assert not read_matmul_nodes(read_graph(folder / "model.onnx")).products


def test_a_sum_that_looks_alike_in_another_graph_is_left(tmp_path: Path) -> None:
    """Only in folders that were converted here is it known what is summed."""
    quantised, _ = write_pair(tmp_path, "llama", "Q4_1")
    folder = convert(read_spec(quantised), tmp_path / "onnx").folder
    graph = read_graph(folder / "model.onnx")
    graph.metadata.clear()
    found = read_matmul_nodes(graph)
    assert {m.type_name for m in found.matrices} == {"Q4_0"}
    outputs = {node.output for node in found.products}
    assert not outputs & {node.outputs[0] for node in graph.nodes if node.kind == "Add"}


def test_a_scale_beyond_two_bytes_is_refused(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", WIDE, bits=4)
    form = repack_plan(folder)
    assert isinstance(form, RepackPlan)
    scales = form.swap.products.matrices[0].scales
    with (folder / (scales.location or "")).open("r+b") as file:
        file.seek(scales.offset)
        file.write(np.float32(70_000).tobytes())
    with pytest.raises(BadModelFile, match="beyond what two bytes hold: leave --repack out"):
        list(form.swap.products.matrices[0].ggml_rows(folder, 16))

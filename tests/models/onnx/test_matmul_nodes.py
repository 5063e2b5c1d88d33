"""Which matmuls of a graph can be repacked, and that their weights in ggml's blocks are the same."""

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
from lowtide.models.onnx.rewrite.block_weights import BlockWeights
from lowtide.models.onnx.rewrite.matmul_nodes import read_matmul_nodes
from lowtide.models.onnx.rewrite.plan import RepackPlan
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.read_spec import read_spec

LAYER = 7
"""Matmuls of a layer: queries, keys, values, output, and three of the feed-forward part."""
WIDE = Shape(width=256, heads=4, kv_heads=4, feed_forward=128)


def repack_plan(folder: Path) -> RepackPlan | str:
    spec = read_spec(folder)
    assert isinstance(spec, OnnxSpec)
    return spec.repack


def dequantised(matrix: BlockWeights, folder: Path) -> np.ndarray:
    """Return the matrix as the gguf library dequantises it."""
    rows = np.concatenate(list(matrix.ggml_rows(folder, 16)))
    assert rows.nbytes == matrix.num_bytes
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[matrix.type_name])


def reference(matrix: BlockWeights, folder: Path) -> np.ndarray:
    """Return (quant - zero point) * scale, as onnxruntime documents MatMulNBits."""
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
def test_weights_are_the_same_in_ggml_blocks(
    tmp_path: Path, written: dict[str, Any], type_name: str
) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", WIDE, **written)
    plan = repack_plan(folder)
    assert isinstance(plan, RepackPlan)
    matmuls = plan.rewrite.matmuls
    assert len(matmuls.matmuls) == len(matmuls.matrices) == WIDE.layers * LAYER + 1
    for matrix in matmuls.matrices:
        assert matrix.type_name == type_name
        expected = reference(matrix, folder)
        found = dequantised(matrix, folder)
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
        assert np.abs(expected).max() > 0.1
    read = {weight.name for m in matmuls.matrices for weight in (m.quants, m.scales)}
    assert not read & plan.rewrite.weights, "onnxruntime keeps weights that it does not read"


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
def test_matmuls_that_cannot_be_repacked_are_named(
    tmp_path: Path, shape: Shape, written: dict[str, Any]
) -> None:
    plan = repack_plan(write_decoder(tmp_path / "tiny", "gqa", shape, **written))
    assert plan == "has no matmul of 4- or 8-bit weights in blocks of 32 that can be repacked"


def test_a_graph_with_its_own_attention_is_not_repacked(tmp_path: Path) -> None:
    plan = repack_plan(write_decoder(tmp_path / "tiny", "decomposed", WIDE, bits=4))
    assert plan == "has decomposed attention"


@pytest.mark.parametrize(
    ("architecture", "kind", "tied", "num_matmuls", "num_gathers"),
    [
        ("llama", "Q4_0", True, 50, 1),
        ("llama", "Q4_1", True, 50, 0),
        ("gemma3", "Q8_0", True, 50, 1),
        ("qwen2", "Q4_0", False, 50, 0),
        ("llama", "Q5_0", True, 50, 1),
    ],
)
def test_converted_folders_have_exactly_the_weights_of_the_source(
    tmp_path: Path, architecture: str, kind: str, tied: bool, num_matmuls: int, num_gathers: int
) -> None:
    """Offsets that the graph adds become a block's minimum again."""
    quantised, exact = write_pair(tmp_path, architecture, kind, tied=tied)
    folder = convert(read_spec(quantised), tmp_path / "onnx").folder
    matmuls = read_matmul_nodes(read_graph(folder / "model.onnx"))
    assert len(matmuls.matmuls) == num_matmuls and len(matmuls.gathers) == num_gathers
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(exact).tensors}
    for matrix in matmuls.matrices:
        name = matrix.quants.name.removesuffix(".quants")
        expected, found = tensors[name].data, dequantised(matrix, folder)
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            expected, found = (
                np.sort(rows, axis=0) for rows in (expected, found)
            )  # heads are unpaired
        np.testing.assert_array_equal(found, expected)


def test_8_bit_weights_with_offsets_are_left_to_the_graph(tmp_path: Path) -> None:
    quantised, _ = write_pair(tmp_path, "llama", "Q5_1")
    folder = convert(read_spec(quantised), tmp_path / "onnx").folder
    assert not read_matmul_nodes(read_graph(folder / "model.onnx")).matmuls


def test_a_similar_sum_in_another_graph_is_left_alone(tmp_path: Path) -> None:
    """Only in converted folders is the meaning of the sum known."""
    quantised, _ = write_pair(tmp_path, "llama", "Q4_1")
    folder = convert(read_spec(quantised), tmp_path / "onnx").folder
    graph = read_graph(folder / "model.onnx")
    graph.metadata.clear()
    found = read_matmul_nodes(graph)
    assert {m.type_name for m in found.matrices} == {"Q4_0"}
    outputs = {node.output for node in found.matmuls}
    assert not outputs & {node.outputs[0] for node in graph.nodes if node.kind == "Add"}


def test_a_scale_that_does_not_fit_fp16_is_refused(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "tiny", "gqa", WIDE, bits=4)
    plan = repack_plan(folder)
    assert isinstance(plan, RepackPlan)
    scales = plan.rewrite.matmuls.matrices[0].scales
    with (folder / (scales.location or "")).open("r+b") as file:
        file.seek(scales.offset)
        file.write(np.float32(70_000).tobytes())
    with pytest.raises(BadModelFile, match="does not fit fp16: leave repack=True out"):
        list(plan.rewrite.matmuls.matrices[0].ggml_rows(folder, 16))

"""Our product kernels against onnxruntime's MatMulNBits at the same shapes.

Weights of 4 bits in blocks of 32 without zero points, rows rounded to 8 bits in blocks (accuracy level 4,
as ours), two threads, more matrices in turn than caches hold. Every call is one from Python and makes or
wakes its threads. Each round times onnxruntime and then ours: above 1 ours is faster. Run with
`make bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from paired import paired

from lowtide.attention.product_kernels import PackedArray, multiply, pack_array
from lowtide.memory.units import MIB

pytestmark = pytest.mark.benchmark

SHAPES = {
    "SmolLM2's output": (49_152, 576),
    "Llama-3.2-1B's up": (8192, 2048),
    "Llama-3.2-1B's down": (2048, 8192),
}
MORE_THAN_CACHES = 96 * MIB
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Sides:
    """The same random matrix, for each engine, as often as it is read in turn."""

    packed: list[PackedArray]
    sessions: list[onnxruntime.InferenceSession]
    num_columns: int

    def rows(self, num_rows: int) -> np.ndarray:
        """Random rows of float32."""
        random = np.random.default_rng(5)
        return random.standard_normal((num_rows, self.num_columns), np.float32)


def ggml_blocks(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return Q4_0's rows of values from 0 to 15, (rows, blocks, 32), and their scales."""
    halves = np.ascontiguousarray(scales.astype(np.float16)[..., None]).view(np.uint8)
    packed = values[..., : BLOCK // 2] | values[..., BLOCK // 2 :] << 4
    return np.concatenate([halves, packed], axis=-1).reshape(len(values), -1)


def session_of(values: np.ndarray, scales: np.ndarray) -> onnxruntime.InferenceSession:
    """Return a graph of one MatMulNBits: neighbours share a byte there."""
    num_rows, num_blocks, _ = values.shape
    packed = values[..., ::2] | values[..., 1::2] << 4
    num_columns = num_blocks * BLOCK
    node = helper.make_node(
        "MatMulNBits", ["rows", "weights", "scales"], ["out"], domain="com.microsoft",
        K=num_columns, N=num_rows, bits=4, block_size=BLOCK, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", num_columns])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", num_rows])],
        [
            numpy_helper.from_array(packed, "weights"),
            numpy_helper.from_array(scales.astype(np.float32).reshape(-1), "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


@pytest.fixture(scope="module", params=SHAPES)
def sides(request: pytest.FixtureRequest) -> tuple[str, Sides]:
    num_rows, num_columns = SHAPES[request.param]
    random = np.random.default_rng(3)
    values = random.integers(0, 16, (num_rows, num_columns // BLOCK, BLOCK), np.uint8)
    scales = (random.random((num_rows, num_columns // BLOCK)) / 64).astype(np.float16)
    copies = MORE_THAN_CACHES // (num_rows * num_columns // 2) + 1
    blocks = ggml_blocks(values, scales)
    return request.param, Sides(
        [pack_array("Q4_0", blocks, num_columns) for _ in range(copies)],
        [session_of(values, scales) for _ in range(copies)],
        num_columns,
    )


@pytest.mark.parametrize("num_rows", [1, 4, 128])
def test_beside_onnxruntime(benchmark: Any, sides: tuple[str, Sides], num_rows: int) -> None:
    name, both = sides
    rows = both.rows(num_rows)

    def ours() -> list[np.ndarray]:
        return [multiply(matrix, rows, threads=2) for matrix in both.packed]

    def theirs() -> list[np.ndarray]:
        return [session.run(None, {"rows": rows})[0] for session in both.sessions]

    error = np.abs(ours()[0] - theirs()[0]).max() / np.abs(theirs()[0]).max()
    assert error < 0.02, "the two do not compute the same"
    paired(
        benchmark, f"{name}, {num_rows} rows", ours, theirs, 9, peer="onnxruntime's MatMulNBits",
        pause_s=0.1,
    )  # fmt: skip
    report_rates(benchmark, both, ours, num_rows)


def report_rates(
    benchmark: Any, both: Sides, ours: Callable[[], list[np.ndarray]], num_rows: int
) -> None:
    """Print bytes of weights and multiplications a second."""
    seconds = benchmark.stats.stats.median
    num_bytes = sum(matrix.panels.nbytes for matrix in both.packed)
    num_products = sum(m.num_rows * m.num_columns for m in both.packed) * num_rows
    benchmark.extra_info.update(
        bytes_per_s=num_bytes / seconds, products_per_s=num_products / seconds
    )
    print(
        f"{num_bytes / seconds / 1e9:.1f} GB/s of weights, {num_products / seconds / 1e9:,.0f} thousand "
        "million multiplications a second"
    )

"""Our product kernels against onnxruntime's MatMulNBits at the same shapes.

Weights of 4 bits in blocks of 32 without zero points, rows rounded to 8 bits in blocks (accuracy level 4,
as ours), two threads, more matrices in turn than caches hold, both into memory that is theirs already: runs
of a graph of as many nodes there, one call here, long enough that starting its threads does not count. Each
round times onnxruntime and then ours: above 1 ours is faster. Run with `make bench`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
from kernel_calls import RepackedArray, multiply_in_turn, repack_array
from onnx import TensorProto, helper, numpy_helper
from paired import paired

from lowtide.memory.units import MIB

pytestmark = pytest.mark.benchmark

SHAPES = {
    "SmolLM2's output": (49_152, 576),
    "Llama-3.2-1B's up": (8192, 2048),
    "Llama-3.2-1B's down": (2048, 8192),
}
MORE_THAN_CACHES = 96 * MIB
BLOCK = 32
TURNS = {1: 64, 4: 32, 128: 4}
"""How often each matrix is read in a round, by rows."""


@dataclass(frozen=True, slots=True)
class Sides:
    """Random matrices that are read in turn, for each engine."""

    packed: list[RepackedArray]
    session: onnxruntime.InferenceSession

    def rows(self, num_rows: int) -> np.ndarray:
        """Random rows of float32."""
        random = np.random.default_rng(5)
        return random.standard_normal((num_rows, self.packed[0].num_columns), np.float32)

    def out(self, num_rows: int, turns: int = 1) -> np.ndarray:
        """Room for all products."""
        shape = (turns * len(self.packed), num_rows, self.packed[0].num_rows)
        return np.zeros(shape, np.float32)


def ggml_blocks(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return Q4_0's rows of values from 0 to 15, (rows, blocks, 32), and their scales."""
    halves = np.ascontiguousarray(scales.astype(np.float16)[..., None]).view(np.uint8)
    packed = values[..., : BLOCK // 2] | values[..., BLOCK // 2 :] << 4
    return np.concatenate([halves, packed], axis=-1).reshape(len(values), -1)


def session_of(values: np.ndarray, scales: np.ndarray, copies: int) -> onnxruntime.InferenceSession:
    """Return a graph of as many MatMulNBits of the same rows: neighbours share a byte there.

    No two have the same weights, which onnxruntime would keep once.
    """
    num_rows, num_blocks, _ = values.shape
    num_columns = num_blocks * BLOCK
    nodes, constants, outputs = [], [], []
    for copy in range(copies):
        names = ["rows", f"weights{copy}", f"scales{copy}"]
        nodes.append(helper.make_node(
            "MatMulNBits", names, [f"out{copy}"], domain="com.microsoft",
            K=num_columns, N=num_rows, bits=4, block_size=BLOCK, accuracy_level=4,
        ))  # fmt: skip
        of_copy = np.roll(values, copy, axis=0)
        packed = of_copy[..., ::2] | of_copy[..., 1::2] << 4
        scales_of_copy = np.roll(scales, copy, axis=0).astype(np.float32)
        constants += [
            numpy_helper.from_array(packed, names[1]),
            numpy_helper.from_array(scales_of_copy.reshape(-1), names[2]),
        ]
        outputs.append(
            helper.make_tensor_value_info(f"out{copy}", TensorProto.FLOAT, ["n", num_rows])
        )
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", num_columns])
    graph = helper.make_graph(nodes, "products", [rows], outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def bound(both: Sides, rows: np.ndarray, out: np.ndarray) -> onnxruntime.IOBinding:
    """Return a run of the session on these rows, into that room."""
    binding = both.session.io_binding()
    binding.bind_cpu_input("rows", rows)
    for copy, of_one in enumerate(out):
        binding.bind_output(f"out{copy}", "cpu", 0, np.float32, of_one.shape, of_one.ctypes.data)
    return binding


@pytest.fixture(scope="module", params=SHAPES)
def sides(request: pytest.FixtureRequest) -> tuple[str, Sides]:
    num_rows, num_columns = SHAPES[request.param]
    random = np.random.default_rng(3)
    values = random.integers(0, 16, (num_rows, num_columns // BLOCK, BLOCK), np.uint8)
    scales = (random.random((num_rows, num_columns // BLOCK)) / 64).astype(np.float16)
    copies = MORE_THAN_CACHES // (num_rows * num_columns // 2) + 1
    blocks = ggml_blocks(values, scales)
    return request.param, Sides(
        [
            repack_array("Q4_0", np.roll(blocks, copy, axis=0), num_columns)
            for copy in range(copies)
        ],
        session_of(values, scales, copies),
    )


@pytest.mark.parametrize("num_rows", TURNS)
def test_beside_onnxruntime(benchmark: Any, sides: tuple[str, Sides], num_rows: int) -> None:
    name, both = sides
    turns = TURNS[num_rows]
    rows, out, their_out = both.rows(num_rows), both.out(num_rows, turns), both.out(num_rows)
    binding = bound(both, rows, their_out)
    seconds: list[float] = []

    def ours() -> None:
        started = time.perf_counter()
        multiply_in_turn(both.packed * turns, rows, out, threads=2)
        seconds.append(time.perf_counter() - started)

    def theirs() -> None:
        for _ in range(turns):
            both.session.run_with_iobinding(binding)

    theirs()
    multiply_in_turn(both.packed * turns, rows, out, threads=2)
    error = np.abs(out[: len(their_out)] - their_out).max() / np.abs(their_out).max()
    assert error < 0.02, "the two do not compute the same"
    paired(
        benchmark, f"{name}, {num_rows} rows", ours, theirs, 9, peer="onnxruntime's MatMulNBits",
        pause_s=0.1,
    )  # fmt: skip
    of_one = statistics.median(seconds) / turns
    num_bytes = sum(matrix.tiles.nbytes for matrix in both.packed) / of_one
    products = sum(m.num_rows * m.num_columns for m in both.packed) * num_rows / of_one
    benchmark.extra_info.update(bytes_per_s=num_bytes, products_per_s=products)
    print(
        f"{num_bytes / 1e9:.1f} GB/s of weights, {products / 1e9:,.0f} thousand million "
        "multiplications a second"
    )

"""lowtide's matmul kernels compared with onnxruntime's MatMulNBits at the same shapes.

4-bit weights in blocks of 32 without zero points, activations quantised to 8 bits in blocks (accuracy level
4), two threads, and more matrices than the caches hold. onnxruntime runs a graph with one node per matrix;
lowtide runs one call that is long enough to hide the start of its threads. Each round times onnxruntime and
then lowtide; above 1 means lowtide is faster. Run with `make bench`.
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
"""How often each matrix is read in a round, by batch size."""


@dataclass(frozen=True, slots=True)
class Engines:
    """The same random matrices for both engines."""

    repacked: list[RepackedArray]
    session: onnxruntime.InferenceSession

    def rows(self, num_rows: int) -> np.ndarray:
        """Return random activations in fp32."""
        random = np.random.default_rng(5)
        return random.standard_normal((num_rows, self.repacked[0].num_columns), np.float32)

    def out(self, num_rows: int, turns: int = 1) -> np.ndarray:
        """Return an array for all results."""
        shape = (turns * len(self.repacked), num_rows, self.repacked[0].num_rows)
        return np.zeros(shape, np.float32)


def ggml_blocks(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return Q4_0 rows from values between 0 and 15, shape (rows, blocks, 32), and their scales."""
    scale_bytes = np.ascontiguousarray(scales.astype(np.float16)[..., None]).view(np.uint8)
    nibbles = values[..., : BLOCK // 2] | values[..., BLOCK // 2 :] << 4
    return np.concatenate([scale_bytes, nibbles], axis=-1).reshape(len(values), -1)


def session_of(values: np.ndarray, scales: np.ndarray, copies: int) -> onnxruntime.InferenceSession:
    """Return a session with `copies` MatMulNBits nodes; neighbouring values share a byte in this format.

    The weights of all nodes differ, because onnxruntime would store equal weights once.
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
        nibbles = of_copy[..., ::2] | of_copy[..., 1::2] << 4
        scales_of_copy = np.roll(scales, copy, axis=0).astype(np.float32)
        constants += [
            numpy_helper.from_array(nibbles, names[1]),
            numpy_helper.from_array(scales_of_copy.reshape(-1), names[2]),
        ]
        outputs.append(
            helper.make_tensor_value_info(f"out{copy}", TensorProto.FLOAT, ["n", num_rows])
        )
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", num_columns])
    graph = helper.make_graph(nodes, "matmuls", [rows], outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def bind(both: Engines, rows: np.ndarray, out: np.ndarray) -> onnxruntime.IOBinding:
    """Bind the activations and the results to the session."""
    binding = both.session.io_binding()
    binding.bind_cpu_input("rows", rows)
    for copy, of_one in enumerate(out):
        binding.bind_output(f"out{copy}", "cpu", 0, np.float32, of_one.shape, of_one.ctypes.data)
    return binding


@pytest.fixture(scope="module", params=SHAPES)
def engines(request: pytest.FixtureRequest) -> tuple[str, Engines]:
    num_rows, num_columns = SHAPES[request.param]
    random = np.random.default_rng(3)
    values = random.integers(0, 16, (num_rows, num_columns // BLOCK, BLOCK), np.uint8)
    scales = (random.random((num_rows, num_columns // BLOCK)) / 64).astype(np.float16)
    copies = MORE_THAN_CACHES // (num_rows * num_columns // 2) + 1
    blocks = ggml_blocks(values, scales)
    return request.param, Engines(
        [
            repack_array("Q4_0", np.roll(blocks, copy, axis=0), num_columns)
            for copy in range(copies)
        ],
        session_of(values, scales, copies),
    )


@pytest.mark.parametrize("num_rows", TURNS)
def test_compared_with_onnxruntime(
    benchmark: Any, engines: tuple[str, Engines], num_rows: int
) -> None:
    name, both = engines
    turns = TURNS[num_rows]
    rows, out, peer_out = both.rows(num_rows), both.out(num_rows, turns), both.out(num_rows)
    binding = bind(both, rows, peer_out)
    seconds: list[float] = []

    def run_lowtide() -> None:
        started = time.perf_counter()
        multiply_in_turn(both.repacked * turns, rows, out, threads=2)
        seconds.append(time.perf_counter() - started)

    def run_peer() -> None:
        for _ in range(turns):
            both.session.run_with_iobinding(binding)

    run_peer()
    multiply_in_turn(both.repacked * turns, rows, out, threads=2)
    error = np.abs(out[: len(peer_out)] - peer_out).max() / np.abs(peer_out).max()
    assert error < 0.02, "the results differ"
    paired(
        benchmark, f"{name}, {num_rows} rows", run_lowtide, run_peer, 9, peer="onnxruntime's MatMulNBits",
        pause_s=0.1,
    )  # fmt: skip
    of_one = statistics.median(seconds) / turns
    num_bytes = sum(matrix.tiles.nbytes for matrix in both.repacked) / of_one
    macs = sum(m.num_rows * m.num_columns for m in both.repacked) * num_rows / of_one
    benchmark.extra_info.update(bytes_per_s=num_bytes, macs_per_s=macs)
    print(f"{num_bytes / 1e9:.1f} GB/s of weights, {macs / 1e9:,.0f} GMAC/s")

"""Matrices of every type have the same values as the gguf library dequantises them to."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from lowtide.models.convert.dequantize import FLOAT_TYPES, MATRIX_TYPES, BlockMatrix, block_matrix

ROWS, COLUMNS = 6, 512


def random_rows(type_name: str) -> np.ndarray:
    """Return the bytes of rows: random bits, but with finite fp16 numbers of both signs."""
    kind = gguf.GGMLQuantizationType[type_name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(3)
    if type_name in FLOAT_TYPES:
        numbers = random.standard_normal((ROWS, COLUMNS)).astype(np.float32)
        return np.asarray(gguf.quants.quantize(numbers, kind)).view(np.uint8).reshape(-1)
    data = random.integers(0, 256, (ROWS * COLUMNS // block, block_bytes), np.uint8)
    halves = {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}
    for start in halves.get(type_name, [0]):
        numbers = random.uniform(-0.1, 0.1, len(data)).astype(np.float16)
        data[:, start : start + 2] = numbers.view(np.uint8).reshape(-1, 2)
    return data.reshape(-1)


def reference(data: np.ndarray, type_name: str) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[type_name]
    if type_name in FLOAT_TYPES:
        data = data.view(np.float32 if type_name == "F32" else np.uint16)
        data = data.view(np.float16) if type_name == "F16" else data
        data = data.view(np.uint8) if type_name == "BF16" else data
    return np.asarray(gguf.quants.dequantize(data, kind), np.float32).reshape(ROWS, COLUMNS)


@pytest.mark.parametrize("type_name", MATRIX_TYPES)
def test_values_are_the_same(type_name: str) -> None:
    data = random_rows(type_name)
    matrix = block_matrix(data, type_name, ROWS)
    expected = reference(data, type_name)
    error = np.abs(matrix.weights() - expected).max() / np.abs(expected).max()
    assert error < (5e-3 if type_name in FLOAT_TYPES else 3e-7)
    assert matrix.quants.dtype == np.uint8 and matrix.scales.dtype == np.float32
    assert matrix.quants.max() < 1 << matrix.bits


def test_the_order_of_quants_in_a_byte() -> None:
    quants = np.array([[1, 2, 3, 15]], np.uint8)
    matrix = BlockMatrix(bits=4, block_size=4, quants=quants, scales=np.ones((1, 1), np.float32))
    assert matrix.packed().tolist() == [[0x21, 0xF3]]

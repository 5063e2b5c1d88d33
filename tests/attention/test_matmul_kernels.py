"""Every matmul kernel against numpy in double precision, and against itself in other batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from kernel_calls import multiply, repack_array, unpack_row, usable_matmul_kernels

from lowtide.attention.bindings.matmul import can_repack, repack_rows
from lowtide.models.errors import LowtideError
from lowtide.models.gguf.header.reader import TENSOR_TYPES, TYPE_NUMBERS
from lowtide.models.gguf.header.repacked import REPACKABLE_TYPES

SETS = usable_matmul_kernels()
FLOATS = ("BF16", "F16")
HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q6_K": (208,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), (0,)),
    "MXFP4": (),
}
"""The offsets of a block's halves; its other bytes may be anything, but for MXFP4's exponents."""


def random_blocks(type_name: str, num_rows: int, num_columns: int) -> Any:
    """Return rows of ggml's blocks, (rows, bytes): random values with small scales; normal floats."""
    random = np.random.default_rng(num_rows + num_columns)
    if type_name in FLOATS:
        values = random.standard_normal((num_rows, num_columns)).astype(np.float32)
        return quants.quantize(values, GGMLQuantizationType[type_name]).view(np.uint8)
    _, size, num_bytes = TENSOR_TYPES[TYPE_NUMBERS[type_name]]
    blocks = random.integers(0, 256, (num_rows, num_columns // size, num_bytes), np.uint8)
    for offset in HALVES[type_name]:
        halves = random.uniform(-0.1, 0.1, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, offset : offset + 2] = halves[..., None].view(np.uint8)
    if type_name == "MXFP4":
        blocks[:, :, 0] = random.integers(110, 130, blocks.shape[:2])
    return blocks.reshape(num_rows, -1)


def dequantised(type_name: str, rows: Any) -> Any:
    return quants.dequantize(rows, GGMLQuantizationType[type_name])


def rounded(rows: Any, type_name: str) -> Any:
    """Return rows as the kernels multiply them: rounded to 8 bits in blocks of 32, unless weights are floats."""
    if type_name in FLOATS:
        return rows.astype(np.float64)
    blocks = rows.reshape(len(rows), -1, 32).astype(np.float64)
    scales = np.abs(blocks).max(-1, keepdims=True) / 127
    steps = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)
    return (np.round(steps) * scales).reshape(rows.shape)


@pytest.mark.parametrize("shape", [(16, 256), (48, 768), (16, 2304)], ids=str)
@pytest.mark.parametrize("type_name", sorted(REPACKABLE_TYPES))
@pytest.mark.parametrize("kernels", SETS)
def test_results_equal_double_precision(
    kernels: str, type_name: str, shape: tuple[int, int]
) -> None:
    blocks = random_blocks(type_name, *shape)
    weights = dequantised(type_name, blocks).astype(np.float64)
    rows = np.random.default_rng(3).standard_normal((13, shape[1])).astype(np.float32)
    rows[7] = 0
    expected = rounded(rows, type_name) @ weights.T
    found = multiply(repack_array(type_name, blocks, shape[1]), rows, kernels=kernels)
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()
    assert not found[7].any()


@pytest.mark.parametrize("type_name", ["Q4_1", "Q8_0", "Q6_K", "Q3_K", "IQ4_XS", "F16", "BF16"])
@pytest.mark.parametrize("kernels", SETS)
def test_a_row_is_the_same_alone_and_in_a_batch(kernels: str, type_name: str) -> None:
    packed = repack_array(type_name, random_blocks(type_name, 112, 512), 512)
    rows = np.random.default_rng(4).standard_normal((37, 512)).astype(np.float32)
    together = multiply(packed, rows, kernels=kernels)
    for first, last in ((0, 1), (5, 7), (11, 14), (30, 37)):
        for threads in (1, 3):
            some = multiply(packed, rows[first:last], kernels=kernels, threads=threads)
            assert np.array_equal(some, together[first:last])


@pytest.mark.parametrize("num_rows", [16, 80])
@pytest.mark.parametrize("type_name", ["Q4_0", "F16", "BF16"])
@pytest.mark.parametrize("kernels", SETS)
def test_odd_numbers_of_blocks_and_tiles(kernels: str, type_name: str, num_rows: int) -> None:
    """A tile of Q4_0 then begins in the middle of a cache line."""
    blocks = random_blocks(type_name, num_rows, 96)
    rows = np.random.default_rng(5).standard_normal((11, 96)).astype(np.float32)
    found = multiply(repack_array(type_name, blocks, 96), rows, kernels=kernels)
    expected = rounded(rows, type_name) @ dequantised(type_name, blocks).astype(np.float64).T
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("type_name", FLOATS)
@pytest.mark.parametrize("kernels", SETS)
def test_every_float_of_two_bytes_is_widened_exactly(kernels: str, type_name: str) -> None:
    """Times the identity every weight is unchanged, subnormal ones, too."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits[~np.isfinite(dequantised(type_name, bits.view(np.uint8).reshape(1, -1))[0])] = 0
    blocks = bits.view(np.uint8).reshape(1024, -1)
    packed = repack_array(type_name, blocks, 64)
    found = multiply(packed, np.eye(64, dtype=np.float32), kernels=kernels)
    assert np.array_equal(found.T, dequantised(type_name, blocks))


@pytest.mark.parametrize("kernels", SETS)
def test_infinite_halves_stay_infinite(kernels: str) -> None:
    blocks = np.zeros((16, 32), np.float16)
    blocks[1, 3], blocks[2, 4], blocks[3, 5] = np.inf, -np.inf, np.nan
    packed = repack_array("F16", blocks.view(np.uint8), 32)
    found = multiply(packed, np.ones((1, 32), np.float32), kernels=kernels)[0]
    assert np.array_equal(found[:5], [0, np.inf, -np.inf, np.nan, 0], equal_nan=True)


@pytest.mark.parametrize("kernels", SETS)
def test_nan_and_inf_in_a_row_count_as_zero(kernels: str) -> None:
    packed = repack_array("Q4_0", random_blocks("Q4_0", 16, 64), 64)
    rows = np.ones((2, 64), np.float32)
    rows[0, 3], rows[1, 5] = np.nan, np.inf
    found = multiply(packed, rows, kernels=kernels)
    without = np.ones((1, 64), np.float32)
    without[0, 3] = 0
    assert np.array_equal(found[0], multiply(packed, without, kernels=kernels)[0])


@pytest.mark.parametrize("type_name", sorted(REPACKABLE_TYPES))
def test_unpacked_rows_equal_ggmls(type_name: str) -> None:
    blocks = random_blocks(type_name, 32, 512)
    packed = repack_array(type_name, blocks, 512)
    assert packed.tiles.nbytes == blocks.nbytes
    found = np.stack([unpack_row(packed, row) for row in range(32)])
    expected = dequantised(type_name, blocks)
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_every_exponent_of_mxfp4_is_read_as_ggml_does() -> None:
    """The smallest are subnormal numbers; with larger ones, sums are not finite."""
    blocks = np.full((16, 16 * 17), 0x31, np.uint8).reshape(16, 16, 17)
    blocks[:, :, 0] = np.arange(256).reshape(16, 16).clip(max=240)
    blocks = blocks.reshape(16, -1)
    packed = repack_array("MXFP4", blocks, 512)
    found = np.stack([unpack_row(packed, row) for row in range(16)])
    assert np.array_equal(found, dequantised("MXFP4", blocks))
    rows = np.eye(512, dtype=np.float32)[::37]
    for kernels in SETS:
        products = multiply(packed, rows, kernels=kernels)
        largest = np.repeat(np.abs(found).reshape(16, 16, 32).max(-1), 32, axis=1)[:, ::37].T
        assert (np.abs(products - found[:, ::37].T) <= 2e-4 * largest).all()


def test_matrices_that_cannot_be_repacked() -> None:
    assert can_repack("Q4_1", 16, 32) and not can_repack("Q4_1", 15, 32)
    assert not can_repack("Q4_K", 16, 128) and not can_repack("Q4_1", 16, 40)
    assert (
        can_repack("F16", 16, 32)
        and not can_repack("F16", 8, 32)
        and not can_repack("BF16", 16, 48)
    )
    assert not can_repack("F32", 16, 32) and not can_repack("nonsense", 16, 32)
    assert not can_repack("Q4_1", 0, 32) and not can_repack("Q4_1", -16, 32)
    with pytest.raises(ValueError, match="cannot be repacked"):
        repack_array("Q4_0", np.zeros((7, 18), np.uint8), 32)
    with pytest.raises(ValueError, match="are not 16 rows"):
        repack_rows("Q4_0", bytearray(17), 16, 32, bytearray(288))


def test_unknown_rows_and_kernels_are_refused() -> None:
    packed = repack_array("Q4_0", random_blocks("Q4_0", 16, 32), 32)
    for row in (-1, 16):
        with pytest.raises(IndexError):
            unpack_row(packed, row)
    with pytest.raises(LowtideError, match="cannot be multiplied"):
        multiply(packed, np.zeros((1, 32), np.float32), kernels="mmx")

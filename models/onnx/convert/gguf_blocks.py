"""ggml's types of rows -> BlockMatrix. Knows no file.

Layouts are ggml's (ggml-common.h, block_q4_0 and the others). All quantised types here lose nothing: 5 and
6 bits are held in 8, and a block's minimum is an offset. Floating-point rows are rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowtide.models.onnx.convert.block_matrix import BlockMatrix, rounded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Blocks = NDArray[Any]

ROUNDED_TYPES = frozenset({"F32", "F16", "BF16"})


def block_matrix(data: Any, type_name: str, rows: int) -> BlockMatrix:
    """Return `rows` rows that lie in the bytes of `data`, an array of uint8."""
    if type_name in ROUNDED_TYPES:
        return rounded(floats(data, type_name).reshape(rows, -1))
    unpack, block_bytes = _UNPACKED[type_name]
    made: BlockMatrix = unpack(data.reshape(-1, block_bytes))
    offsets = made.offsets
    return BlockMatrix(
        bits=made.bits,
        block_size=made.block_size,
        quants=made.quants.reshape(rows, -1),
        scales=made.scales.reshape(rows, -1),
        offsets=None if offsets is None else offsets.reshape(rows, -1),
    )


def floats(data: Any, type_name: str) -> NDArray[np.float32]:
    """Return the numbers in bytes of a floating-point type."""
    import numpy as np

    if type_name == "BF16":
        wide = data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return np.asarray(wide.view(np.float32))
    return np.asarray(data.view(np.float16 if type_name == "F16" else np.float32), np.float32)


def _half(blocks: Blocks, start: int) -> NDArray[np.float32]:
    """Return the 16-bit number at byte `start` of each block, (blocks, 1)."""
    import numpy as np

    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(halves: Blocks) -> Blocks:
    """Return the lower halves of all bytes, then the upper ones, along the last axis."""
    import numpy as np

    return np.concatenate([halves & 15, halves >> 4], axis=-1)


def _fifth_bits(blocks: Blocks, start: int) -> Blocks:
    """Return the 32 bits at byte `start` of each block, moved to where a fifth bit stands."""
    import numpy as np

    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << 4


def _q4_0(blocks: Blocks) -> BlockMatrix:
    return BlockMatrix(
        bits=4, block_size=32, quants=_nibbles(blocks[:, 2:]), scales=_half(blocks, 0)
    )


def _q4_1(blocks: Blocks) -> BlockMatrix:
    scales = _half(blocks, 0)
    return BlockMatrix(
        bits=4,
        block_size=32,
        quants=_nibbles(blocks[:, 4:]),
        scales=scales,
        offsets=_half(blocks, 2) + 8 * scales,
    )


def _q5_0(blocks: Blocks) -> BlockMatrix:
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return BlockMatrix(bits=8, block_size=32, quants=quants + 112, scales=_half(blocks, 0))


def _q5_1(blocks: Blocks) -> BlockMatrix:
    scales = _half(blocks, 0)
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return BlockMatrix(
        bits=8,
        block_size=32,
        quants=quants + 112,
        scales=scales,
        offsets=_half(blocks, 2) + 16 * scales,
    )


def _q8_0(blocks: Blocks) -> BlockMatrix:
    return BlockMatrix(bits=8, block_size=32, quants=blocks[:, 2:] ^ 128, scales=_half(blocks, 0))


def _k_scales(blocks: Blocks) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the scales and minima of the 8 inner blocks of Q4_K and Q5_K, (blocks, 8) each."""
    import numpy as np

    packed = blocks[:, 4:16]
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minima


def _q4_k(blocks: Blocks) -> BlockMatrix:
    scales, minima = _k_scales(blocks)
    quants = _nibbles(blocks[:, 16:].reshape(-1, 4, 32))
    return BlockMatrix(
        bits=4, block_size=32, quants=quants, scales=scales, offsets=8 * scales - minima
    )


def _q5_k(blocks: Blocks) -> BlockMatrix:
    import numpy as np

    scales, minima = _k_scales(blocks)
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = ((blocks[:, None, 16:48] >> shifts) & 1) << 4
    quants = (low | fifth) + 112
    return BlockMatrix(
        bits=8, block_size=32, quants=quants, scales=scales, offsets=16 * scales - minima
    )


def _q6_k(blocks: Blocks) -> BlockMatrix:
    import numpy as np

    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    quants = (low | (high << 4)) + 96
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return BlockMatrix(bits=8, block_size=16, quants=quants, scales=scales)


_UNPACKED: dict[str, tuple[Callable[[Any], BlockMatrix], int]] = {
    "Q4_0": (_q4_0, 18),
    "Q4_1": (_q4_1, 20),
    "Q5_0": (_q5_0, 22),
    "Q5_1": (_q5_1, 24),
    "Q8_0": (_q8_0, 34),
    "Q4_K": (_q4_k, 144),
    "Q5_K": (_q5_k, 176),
    "Q6_K": (_q6_k, 210),
}
MATRIX_TYPES = (*_UNPACKED, *sorted(ROUNDED_TYPES))
"""The types that matrices may have."""

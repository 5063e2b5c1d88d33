"""Reads GGUF tensors as matrices that onnxruntime's operators understand, a few rows at a time.

Layouts are ggml's (ggml-common.h, block_q4_0 and the others). Converting quantised types loses nothing: 5-
and 6-bit quants are stored in 8 bits, and a block's minimum becomes an offset. Floating-point matrices are
rounded to 8 bits.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import UnsupportedModel
from lowtide.models.gguf.header.reader import TENSOR_TYPES, TYPE_NUMBERS, TensorInfo, read_gguf
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Blocks = NDArray[Any]


INT8_BITS, INT8_BLOCK = 8, 32
"""What floating-point rows are quantised to."""
FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
SLICE_BYTES = 4 << 20
"""About how much of a file is dequantised at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMatrix:
    """Rows of `columns` weights: weight = (quant - 2 ** (bits - 1)) * scale + offset.

    `quants` is (rows, columns) of uint8, `scales` and `offsets` (rows, columns / block_size) of float32;
    `offsets` is None where all are zero. MatMulNBits and GatherBlockQuantized (onnxruntime, "Contrib
    operators") compute the same without zero points; the graph must add the offsets.
    """

    bits: int
    block_size: int
    quants: NDArray[Any]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None = None

    def packed(self) -> NDArray[Any]:
        """Return the rows' bytes; of two 4-bit quants in a byte, the first is the lower half."""
        if self.bits == 8:
            return self.quants
        low, high = self.quants[:, 0::2], self.quants[:, 1::2]
        packed: NDArray[Any] = low | (high << 4)
        return packed

    def weights(self) -> NDArray[np.float32]:
        """Return the weights, (rows, columns)."""
        import numpy as np

        rows, num_blocks = self.scales.shape
        centred = self.quants.reshape(rows, num_blocks, -1).astype(np.float32)
        centred -= np.float32(1 << (self.bits - 1))
        weights = centred * self.scales[:, :, None]
        if self.offsets is not None:
            weights += self.offsets[:, :, None]
        return weights.reshape(rows, -1)


def quantised_int8(weights: NDArray[np.float32]) -> BlockMatrix:
    """Round rows to 8 bits in blocks of 32, the largest magnitude of each block to 127."""
    import numpy as np

    rows, columns = weights.shape
    blocks = weights.reshape(rows, columns // INT8_BLOCK, INT8_BLOCK)
    scales = (np.abs(blocks).max(axis=2) / np.float32(127)).astype(np.float32)
    steps = np.where(scales > 0, scales, np.float32(1))[:, :, None]
    quants = (np.rint(blocks / steps) + 128).astype(np.uint8)
    return BlockMatrix(
        bits=INT8_BITS,
        block_size=INT8_BLOCK,
        quants=quants.reshape(rows, columns),
        scales=scales,
    )


def block_matrix(data: Any, type_name: str, rows: int) -> BlockMatrix:
    """Return the matrix of `rows` rows of a ggml type in `data`, an array of uint8."""
    if type_name in FLOAT_TYPES:
        return quantised_int8(floats(data, type_name).reshape(rows, -1))
    blocks = data.reshape(-1, TENSOR_TYPES[TYPE_NUMBERS[type_name]][2])
    matrix = _UNPACKERS[type_name](blocks)
    offsets = matrix.offsets
    return BlockMatrix(
        bits=matrix.bits,
        block_size=matrix.block_size,
        quants=matrix.quants.reshape(rows, -1),
        scales=matrix.scales.reshape(rows, -1),
        offsets=None if offsets is None else offsets.reshape(rows, -1),
    )


def floats(data: Any, type_name: str) -> NDArray[np.float32]:
    """Return the numbers of a floating-point type in `data`, an array of uint8."""
    import numpy as np

    if type_name == "BF16":
        wide = data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return np.asarray(wide.view(np.float32))
    return np.asarray(data.view(np.float16 if type_name == "F16" else np.float32), np.float32)


def _fp16(blocks: Blocks, start: int) -> NDArray[np.float32]:
    """Return the fp16 number at byte `start` of each block, (blocks, 1)."""
    import numpy as np

    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Blocks) -> Blocks:
    """Return the lower halves of all bytes, then the upper ones, along the last axis."""
    import numpy as np

    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: Blocks, start: int) -> Blocks:
    """Return the 32 bits at byte `start` of each block, each shifted to the fifth bit of a quant."""
    import numpy as np

    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << 4


def _q4_0(blocks: Blocks) -> BlockMatrix:
    return BlockMatrix(
        bits=4, block_size=32, quants=_nibbles(blocks[:, 2:]), scales=_fp16(blocks, 0)
    )


def _q4_1(blocks: Blocks) -> BlockMatrix:
    scales = _fp16(blocks, 0)
    return BlockMatrix(
        bits=4,
        block_size=32,
        quants=_nibbles(blocks[:, 4:]),
        scales=scales,
        offsets=_fp16(blocks, 2) + 8 * scales,
    )


def _q5_0(blocks: Blocks) -> BlockMatrix:
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return BlockMatrix(bits=8, block_size=32, quants=quants + 112, scales=_fp16(blocks, 0))


def _q5_1(blocks: Blocks) -> BlockMatrix:
    scales = _fp16(blocks, 0)
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return BlockMatrix(
        bits=8,
        block_size=32,
        quants=quants + 112,
        scales=scales,
        offsets=_fp16(blocks, 2) + 16 * scales,
    )


def _q8_0(blocks: Blocks) -> BlockMatrix:
    return BlockMatrix(bits=8, block_size=32, quants=blocks[:, 2:] ^ 128, scales=_fp16(blocks, 0))


def _k_scales(blocks: Blocks) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the scales and minima of the 8 inner blocks of Q4_K and Q5_K, (blocks, 8) each."""
    import numpy as np

    packed = blocks[:, 4:16]
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return _fp16(blocks, 0) * scales, _fp16(blocks, 2) * minima


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
    scales = _fp16(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return BlockMatrix(bits=8, block_size=16, quants=quants, scales=scales)


_UNPACKERS: dict[str, Callable[[Blocks], BlockMatrix]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
MATRIX_TYPES = (*_UNPACKERS, *sorted(FLOAT_TYPES))
"""The types that matrices may have."""


class GgufWeights:
    """The tensors of all parts of a model; it tracks which were read, so that none is left out of a graph.

    Raises `UnsupportedModel`, before anything is read, for a tensor type that cannot be converted.
    """

    def __init__(self, spec: ModelSpec) -> None:
        import numpy as np

        self._path = spec.path
        self._tensors: dict[str, tuple[TensorInfo, Any]] = {}
        for path in spec.paths:
            contents = read_gguf(path)
            data = _mapped(contents.path)
            for tensor in contents.tensors:
                start = contents.data_start + tensor.offset
                view = np.frombuffer(data, np.uint8, tensor.num_bytes, start)
                self._tensors[tensor.name] = tensor, view
                self._check_type(tensor)
        self._unread = set(self._tensors)

    def _check_type(self, tensor: TensorInfo) -> None:
        if tensor.type_name not in (MATRIX_TYPES if len(tensor.shape) > 1 else FLOAT_TYPES):
            raise self._unsupported(
                f"{tensor.name} is {tensor.type_name}; only {', '.join(MATRIX_TYPES)} can be converted"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return (rows, columns) of a matrix, (length,) of a vector."""
        return self._read(name)[0].shape[::-1]

    def num_bytes(self, name: str) -> int:
        """Return what the tensor takes in its file."""
        return self._read(name)[0].num_bytes

    def type_name(self, name: str) -> str:
        """Return the tensor's ggml type."""
        return self._read(name)[0].type_name

    def vector(self, name: str) -> NDArray[np.float32]:
        """Return a floating-point tensor in its shape; raise `UnsupportedModel` for another type."""
        tensor, data = self._read(name)
        if tensor.type_name not in FLOAT_TYPES:
            raise self._unsupported(
                f"{name} is {tensor.type_name}; it must be a floating-point type"
            )
        return floats(data, tensor.type_name).reshape(self.shape(name))

    def slices(self, name: str, heads: int = 0) -> Iterator[BlockMatrix]:
        """Yield a matrix, a few rows at a time.

        With `heads`, the order of rows within each head is that of the original model instead of llama.cpp's
        (see `unpaired`).
        """
        import numpy as np

        tensor, data = self._read(name)
        rows, columns = self.shape(name)
        if columns % INT8_BLOCK:
            raise self._unsupported(
                f"{name} has {columns} columns; only multiples of 32 can be converted"
            )
        by_row = data.reshape(rows, -1)
        order = unpaired(rows, heads) if heads else None
        step = max(SLICE_BYTES // by_row.shape[1], 1)
        for start in range(0, rows, step):
            part = (
                by_row[start : start + step]
                if order is None
                else by_row[order[start : start + step]]
            )
            yield block_matrix(np.ascontiguousarray(part).reshape(-1), tensor.type_name, len(part))

    def require_all_read(self) -> None:
        """Raise `UnsupportedModel` where a tensor was never read: the graph would lack it."""
        if self._unread:
            raise self._unsupported(f"the graph has no place for its tensor {min(self._unread)}")

    def close(self) -> None:
        """Close the files."""
        self._tensors.clear()

    def _read(self, name: str) -> tuple[TensorInfo, Any]:
        if name not in self._tensors:
            raise self._unsupported(f"it has no tensor {name}, which its architecture needs")
        self._unread.discard(name)
        return self._tensors[name]

    def _unsupported(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._path} cannot be converted: {reason}; run the GGUF file itself"
        )


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def unpaired(rows: int, heads: int) -> Sequence[int] | Any:
    """Return, for each row in the original order, its place in llama.cpp's.

    llama.cpp's converter interleaves the two halves of each head, so that rotary embedding works on
    neighbouring rows.
    """
    import numpy as np

    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

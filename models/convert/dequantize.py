"""GgufWeights: the tensors of a GGUF model by name, read from the mapped files a few rows at a time.

ggml's types of rows -> BlockMatrix. Knows no file.

Layouts are ggml's (ggml-common.h, block_q4_0 and the others). All quantised types here lose nothing: 5 and
6 bits are held in 8, and a block's minimum is an offset. Floating-point rows are rounded to 8 bits.

BlockMatrix: quantised rows as onnxruntime's operators read them. Knows no file format."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import UnsupportedModel
from lowtide.models.gguf.reader import TensorInfo, read_gguf
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Blocks = NDArray[Any]


ROUNDED_BITS, ROUNDED_BLOCK = 8, 32
"""What rows of floating-point numbers are rounded to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMatrix:
    """Rows of `columns` weights: weight = (quant - 2 ** (bits - 1)) * scale + offset.

    `quants` is (rows, columns) of uint8, `scales` and `offsets` (rows, columns / block_size) of float32;
    `offsets` is None where all are zero. MatMulNBits and GatherBlockQuantized (onnxruntime, "Contrib
    operators") mean the same without zero points; offsets are for the graph to add.
    """

    bits: int
    block_size: int
    quants: NDArray[Any]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None = None

    def packed(self) -> NDArray[Any]:
        """Return the rows' bytes: of 4 bits, the earlier quant is the lower half."""
        if self.bits == 8:
            return self.quants
        low, high = self.quants[:, 0::2], self.quants[:, 1::2]
        both: NDArray[Any] = low | (high << 4)
        return both

    def weights(self) -> NDArray[np.float32]:
        """Return the weights, (rows, columns)."""
        import numpy as np

        rows, num_blocks = self.scales.shape
        centred = self.quants.reshape(rows, num_blocks, -1).astype(np.float32)
        centred -= np.float32(1 << (self.bits - 1))
        found = centred * self.scales[:, :, None]
        if self.offsets is not None:
            found += self.offsets[:, :, None]
        return found.reshape(rows, -1)


def use_bf16(weights: NDArray[np.float32]) -> BlockMatrix:
    """Round rows to 8 bits in blocks of 32, each block's largest magnitude to 127."""
    import numpy as np

    rows, columns = weights.shape
    blocks = weights.reshape(rows, columns // ROUNDED_BLOCK, ROUNDED_BLOCK)
    scales = (np.abs(blocks).max(axis=2) / np.float32(127)).astype(np.float32)
    steps = np.where(scales > 0, scales, np.float32(1))[:, :, None]
    quants = (np.rint(blocks / steps) + 128).astype(np.uint8)
    return BlockMatrix(
        bits=ROUNDED_BITS,
        block_size=ROUNDED_BLOCK,
        quants=quants.reshape(rows, columns),
        scales=scales,
    )


ROUNDED_TYPES = frozenset({"F32", "F16", "BF16"})


def block_matrix(data: Any, type_name: str, rows: int) -> BlockMatrix:
    """Return `rows` rows that lie in the bytes of `data`, an array of uint8."""
    if type_name in ROUNDED_TYPES:
        return use_bf16(floats(data, type_name).reshape(rows, -1))
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


SLICE_BYTES = 4 << 20
"""About so much of a file is unpacked at a time."""


class GgufWeights:
    """The tensors of all parts; what was asked for is counted, so that none is forgotten.

    Raises `UnsupportedModel`, before anything is read, for a tensor of a type that has no conversion.
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
        if tensor.type_name not in (MATRIX_TYPES if len(tensor.shape) > 1 else ROUNDED_TYPES):
            raise self._unsupported(
                f"{tensor.name} is {tensor.type_name}, one of {', '.join(MATRIX_TYPES)} is wanted"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return (rows, columns) of a matrix, (length,) of a vector."""
        return self._found(name)[0].shape[::-1]

    def num_bytes(self, name: str) -> int:
        """Return what the tensor takes in its file."""
        return self._found(name)[0].num_bytes

    def type_name(self, name: str) -> str:
        """Return ggml's name of the tensor's type."""
        return self._found(name)[0].type_name

    def vector(self, name: str) -> NDArray[np.float32]:
        """Return a tensor of floating-point numbers, in its shape; raises `UnsupportedModel` for others."""
        tensor, data = self._found(name)
        if tensor.type_name not in ROUNDED_TYPES:
            raise self._unsupported(
                f"{name} is {tensor.type_name}, floating-point numbers are wanted"
            )
        return floats(data, tensor.type_name).reshape(self.shape(name))

    def slices(self, name: str, heads: int = 0) -> Iterator[BlockMatrix]:
        """Yield a matrix's rows from the first on, a few at a time.

        With `heads`, rows of each head that llama.cpp's converter has paired go back to halves.
        """
        import numpy as np

        tensor, data = self._found(name)
        rows, columns = self.shape(name)
        if columns % ROUNDED_BLOCK:
            raise self._unsupported(f"{name} has {columns} columns, a multiple of 32 is wanted")
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
        """Raise `UnsupportedModel` where a tensor was never asked for: the graph would lack it."""
        if self._unread:
            raise self._unsupported(
                f"{min(self._unread)} is a tensor that its graph has no place for"
            )

    def close(self) -> None:
        """Let go of the files."""
        self._tensors.clear()

    def _found(self, name: str) -> tuple[TensorInfo, Any]:
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
    """Return where each row of halves lies among rows of pairs, head by head."""
    import numpy as np

    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

"""GgufWeights: the tensors of a GGUF model by name, read from the mapped files a few rows at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import UnsupportedModel
from lowtide.models.gguf_reader import TensorInfo, read_gguf
from lowtide.models.onnx.convert.block_matrix import ROUNDED_BLOCK, BlockMatrix
from lowtide.models.onnx.convert.gguf_blocks import (
    MATRIX_TYPES,
    ROUNDED_TYPES,
    block_matrix,
    floats,
)
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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

"""ExternalData: the file beside a graph that has its weights, written from front to back."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

from lowtide.models.onnx.libraries import onnx_library

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE = 4096
"""Where a tensor begins: onnxruntime maps data that does ("ExternalDataInfo" of onnx)."""


class ExternalData:
    """Appends arrays to `file`, whose name beside the graph is `location`."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file = file
        self._location = location
        self._end = 0

    def begin(self) -> int:
        """Go to the next page; return where it begins."""
        padding = -self._end % PAGE
        self._file.write(b"\0" * padding)
        self._end += padding
        return self._end

    def append(self, array: NDArray[Any]) -> None:
        """Write an array behind what is there."""
        import numpy as np

        self._file.write(np.ascontiguousarray(array).data)
        self._end += array.nbytes

    def tensor(self, name: str, shape: tuple[int, ...], element: str, start: int) -> Any:
        """Return the graph's entry for the data that begins at `start`."""
        onnx = onnx_library("onnx")
        kind = {"uint8": onnx.TensorProto.UINT8, "float32": onnx.TensorProto.FLOAT}[element]
        entry = onnx.TensorProto(
            name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL
        )
        length = prod(shape) * (1 if element == "uint8" else 4)
        for key, value in (("location", self._location), ("offset", start), ("length", length)):
            entry.external_data.add(key=key, value=str(value))
        return entry

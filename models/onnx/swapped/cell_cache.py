"""CellCache: keys and values of a graph whose attention is ours, in the layout that our kernels read.

Layout of a tensor: (cells, heads, head size), so that a token's lies together. Knows no budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowtide.models.onnx.kv_buffer import KvBuffer
from lowtide.models.onnx.token_cache import TokenCache

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KV_DTYPES = {"f32": "float32", "f16": "float16"}


class CellCache(TokenCache):
    """Two buffers a layer, keys and values; `kv_type` is f32 or f16."""

    def __init__(
        self, num_layers: int, num_heads: int, head_size: int, context: int, kv_type: str
    ) -> None:
        import numpy as np

        self.kv_type = kv_type
        self._dtype = np.dtype(KV_DTYPES[kv_type])
        self._shape = (num_heads, head_size)
        self._row_bytes = num_heads * head_size * self._dtype.itemsize
        self._buffers = [KvBuffer(1, context, self._row_bytes) for _ in range(2 * num_layers)]

    def tensor(self, layer: int, which: int) -> NDArray[np.generic]:
        """Return a layer's keys (0) or values (1), (cells, heads, head size), over the buffer's pages."""
        import ctypes

        import numpy as np

        buffer = self._buffers[2 * layer + which]
        pages = (ctypes.c_ubyte * buffer.num_bytes).from_address(buffer.address)
        tensor: NDArray[np.generic] = np.ctypeslib.as_array(pages).view(self._dtype)
        return tensor.reshape(buffer.num_cells, *self._shape)

    def cut(self, num_tokens: int, kept: int) -> None:
        """Give back the pages from the first forgotten token on."""
        for buffer in self._buffers:
            buffer.release(kept * self._row_bytes, buffer.num_bytes)

    def rows(self, num_tokens: int) -> Iterator[memoryview]:
        """Yield a view a tensor."""
        for buffer in self._buffers:
            with buffer.view[: num_tokens * self._row_bytes] as part:
                yield part

    def close(self) -> None:
        """Close the buffers; their tensors must not be read any more."""
        for buffer in self._buffers:
            buffer.close()

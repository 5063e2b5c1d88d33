"""The KV cache of a whole graph: its buffers, bound to a session before each pass.

Layout of a tensor: (1, heads, cells, head size), as graphs have it. Knows no budget.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from lowtide.models.onnx.kv_buffer import KvBuffer
from lowtide.models.onnx.spec import OnnxSpec
from lowtide.models.onnx.token_cache import TokenCache

ELEMENT_BYTES = {"float32": 4, "float16": 2}


class KvCache(TokenCache):
    """Keys and values of every layer."""

    def __init__(self, spec: OnnxSpec, context: int) -> None:
        self._heads, self._head_size = spec.num_kv_heads[0], spec.key_head_size
        self._row_bytes = self._head_size * ELEMENT_BYTES[spec.kv_element]
        self._element = spec.kv_element
        self._names = [
            (past, present)
            for layer in spec.ports.layers
            for past, present in zip(layer.past, layer.present, strict=True)
        ]
        self._context = context

    def _buffer(self) -> KvBuffer:
        return KvBuffer(self._heads, self._context, self._row_bytes)

    def _shape(self, num_cells: int) -> list[int]:
        return [1, self._heads, num_cells, self._head_size]

    @abstractmethod
    def bind(self, binding: Any, num_past: int, num_rows: int) -> None:
        """Bind what is read and what is written in a pass of `num_rows` after `num_past` tokens."""

    @abstractmethod
    def appended(self) -> None:
        """Take what the pass has written as the cache."""


class SharedCache(KvCache):
    """New keys and values are written behind the old ones, in one buffer a tensor."""

    def __init__(self, spec: OnnxSpec, context: int) -> None:
        super().__init__(spec, context)
        self._buffers = [self._buffer() for _ in self._names]
        self._is_bound = False

    def bind(self, binding: Any, num_past: int, num_rows: int) -> None:
        """Bind every buffer, once: the pass is told the number of tokens by the attention mask."""
        if self._is_bound:
            return
        for (past, present), buffer in zip(self._names, self._buffers, strict=True):
            shape = self._shape(buffer.num_cells)
            binding.bind_input(past, "cpu", 0, _type(self._element), shape, buffer.address)
            binding.bind_output(present, "cpu", 0, _type(self._element), shape, buffer.address)
        self._is_bound = True

    def appended(self) -> None:
        """It lies where it belongs."""

    def cut(self, num_tokens: int, kept: int) -> None:
        """Give back the pages of every head from the first forgotten token on."""
        for buffer in self._buffers:
            head_bytes = buffer.num_cells * self._row_bytes
            for start in range(0, buffer.num_bytes, head_bytes):
                buffer.release(start + kept * self._row_bytes, start + head_bytes)

    def rows(self, num_tokens: int) -> Iterator[memoryview]:
        """Yield a view a head."""
        for buffer in self._buffers:
            head_bytes = buffer.num_cells * self._row_bytes
            for start in range(0, buffer.num_bytes, head_bytes):
                with buffer.view[start : start + num_tokens * self._row_bytes] as part:
                    yield part

    def close(self) -> None:
        """Close the buffers."""
        for buffer in self._buffers:
            buffer.close()


class CopiedCache(KvCache):
    """A pass makes a longer copy: two buffers a tensor take turns."""

    def __init__(self, spec: OnnxSpec, context: int) -> None:
        super().__init__(spec, context)
        self._old, self._new = ([self._buffer() for _ in self._names] for _ in range(2))

    def bind(self, binding: Any, num_past: int, num_rows: int) -> None:
        """Bind the old buffers as what is read, the new ones as what is written."""
        kind = _type(self._element)
        past_shape, shape = self._shape(num_past), self._shape(num_past + num_rows)
        for (past, present), old, new in zip(self._names, self._old, self._new, strict=True):
            binding.bind_input(past, "cpu", 0, kind, past_shape, old.address)
            binding.bind_output(present, "cpu", 0, kind, shape, new.address)

    def appended(self) -> None:
        """Let the buffers take turns."""
        self._old, self._new = self._new, self._old

    def cut(self, num_tokens: int, kept: int) -> None:
        """Move the heads together and give the rest back, of both copies."""
        before, after = num_tokens * self._row_bytes, kept * self._row_bytes
        for buffer in self._old:
            for head in range(1, self._heads):
                start = head * before
                # One after the other to the front: none is written before it was read.
                buffer.view[head * after : (head + 1) * after] = buffer.view[start : start + after]
            buffer.release(self._heads * after, buffer.num_bytes)
        for buffer in self._new:
            buffer.release(0, buffer.num_bytes)

    def rows(self, num_tokens: int) -> Iterator[memoryview]:
        """Yield a view a head."""
        length = num_tokens * self._row_bytes
        for buffer in self._old:
            for head in range(self._heads):
                with buffer.view[head * length : (head + 1) * length] as part:
                    yield part

    def close(self) -> None:
        """Close the buffers."""
        for buffer in (*self._old, *self._new):
            buffer.close()


def made_cache(spec: OnnxSpec) -> Callable[[OnnxSpec, int], KvCache]:
    """Return the kind of cache that the graph has."""
    return SharedCache if spec.shares_cache else CopiedCache


def _type(element: str) -> Any:
    import numpy as np

    return np.dtype(element)

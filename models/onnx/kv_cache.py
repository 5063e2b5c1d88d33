"""The KV cache of a whole graph: its buffers, bound to a session before each pass.

Layout of a tensor: (1, heads, cells, head size), as graphs have it. Knows no budget.

KvBuffer: one tensor of a KV cache, in pages that follow its use. Knows no graph.

TokenCache: keys and values that follow the tokens in use, whoever attends to them.

The KV cache of an ONNX model in a file: its tokens and their cells, part by part, and back.

Parts are written from where they lie and read to where they belong: no copy of them is made, and cells
without a token stay untouched. Knows no checksum.

SlotCache: keys and values of a graph whose attention is ours, in the layout that our kernels read.

Layout of a tensor: (cells, heads, head size), so that a token's lies together. Knows no budget."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import struct
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import SnapshotError
from lowtide.models.onnx.spec import OnnxSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


KV_PADDING = 256
"""Cells of a buffer are a multiple of this: then a head's begin with a page, in every head size."""
_IS_LINUX = sys.platform == "linux"


class KvBuffer:
    """Room for `num_cells` cells of `num_heads` heads; untouched pages take no memory (on Linux)."""

    def __init__(self, num_heads: int, num_cells: int, row_bytes: int) -> None:
        self.num_heads = num_heads
        self.num_cells = -(-num_cells // KV_PADDING) * KV_PADDING
        self.row_bytes = row_bytes
        self.num_bytes = num_heads * self.num_cells * row_bytes
        self._pages = mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if _IS_LINUX:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._pages.madvise(mmap.MADV_NOHUGEPAGE)
        self.view = memoryview(self._pages)
        self._byte = ctypes.c_char.from_buffer(self._pages)
        self.address = ctypes.addressof(self._byte)

    def release(self, start: int, end: int) -> None:
        """Give back the whole pages inside [start, end), in bytes; they are zeros when read again."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if _IS_LINUX and length > 0:
            self._pages.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Give everything back; closing twice is allowed."""
        if self._pages.closed:
            return
        self.view.release()
        del self._byte
        self._pages.close()


class TokenCache(ABC):
    """Keys and values of every layer, for one sequence of tokens."""

    @abstractmethod
    def cut(self, num_tokens: int, kept: int) -> None:
        """Forget the tokens from `kept` on, of `num_tokens`, and give their pages back."""

    @abstractmethod
    def rows(self, num_tokens: int) -> Iterator[memoryview]:
        """Yield the bytes of the tokens in every tensor, part by part; they can be written.

        A part is released as the next one is asked for: whoever keeps one would keep a buffer from closing.
        """

    def num_bytes(self, num_tokens: int) -> int:
        """Return the bytes of all parts."""
        return sum(part.nbytes for part in self.rows(num_tokens))

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""


ELEMENT_BYTES = {"float32": 4, "float16": 2}


class KvCache(TokenCache):
    """Keys and values of every layer."""

    def __init__(self, spec: OnnxSpec, context: int) -> None:
        self._heads, self._head_size = spec.num_kv_heads[0], spec.key_head_dim
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


MAGIC, VERSION = b"onnx-kv\0", 1
_HEADER = struct.Struct("<8sII")
"""Magic, version, how many tokens; their numbers follow, four bytes each, and then the cells."""
_ID_BYTES = array("i").itemsize


def write_cells(path: Path, token_ids: Sequence[int], cache: TokenCache) -> int:
    """Write the tokens and their cells, and return the file's bytes.

    Raises `SnapshotError` with the system's reason.
    """
    try:
        with path.open("wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, len(token_ids)))
            file.write(array("i", token_ids))
            for part in cache.rows(len(token_ids)):
                file.write(part)
            return file.tell()
    except OSError as error:
        raise SnapshotError(error.strerror or str(error)) from None


def read_cells(
    path: Path, num_bytes: int, cache: TokenCache, *, num_tokens: int, vocabulary: int
) -> list[int]:
    """Read the cells of `num_tokens` from the first `num_bytes` of a file, and return its tokens.

    Raises `SnapshotError` where the file has others, or another number of bytes; cells may then hold anything.
    """
    num_id_bytes = num_tokens * _ID_BYTES
    wanted = _HEADER.size + num_id_bytes + cache.num_bytes(num_tokens)
    try:
        with path.open("rb") as file:
            header = file.read(min(num_bytes, _HEADER.size))
            _check_header(header, num_tokens)
            if num_bytes != wanted:
                raise SnapshotError(f"it has {num_bytes:,} bytes, {wanted:,} are wanted")
            id_bytes = file.read(num_id_bytes)
            if len(id_bytes) < num_id_bytes:
                raise SnapshotError(f"it ends before its {num_tokens:,} tokens do")
            token_ids = array("i", id_bytes)
            if not all(0 <= token_id < vocabulary for token_id in token_ids):
                raise SnapshotError("it holds tokens that are not in the vocabulary")
            for part in cache.rows(num_tokens):
                if file.readinto(part) != part.nbytes:
                    raise SnapshotError("it ends before its cells do")
    except OSError as error:
        raise SnapshotError(error.strerror or str(error)) from None
    return token_ids.tolist()


def _check_header(header: bytes, num_tokens: int) -> None:
    if len(header) < _HEADER.size or _HEADER.unpack(header)[:2] != (MAGIC, VERSION):
        raise SnapshotError("it is no KV cache of an ONNX model, or one of another version")
    num_held = _HEADER.unpack(header)[2]
    if num_held != num_tokens:
        raise SnapshotError(f"it holds {num_held:,} tokens, {num_tokens:,} are wanted")


KV_DTYPES = {"f32": "float32", "f16": "float16"}


class SlotCache(TokenCache):
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

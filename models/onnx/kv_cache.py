"""The KV cache of an ONNX model: one buffer per tensor, in pages that are resident only where tokens lie.

A graph that runs as it is has its cache bound to the session, (1, kv_heads, slots, head_dim) per tensor
(`SharedCache`, `CopiedCache`). With lowtide's attention the cache is `SlotCache`, (slots, kv_heads,
head_dim), so that a token's heads lie together. `write_cache` and `read_cache` move the tokens in use to a
file and back without another copy.
"""

from __future__ import annotations

import ctypes
import struct
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import SnapshotError
from lowtide.models.onnx.spec import ELEMENT_BYTES, KV_TYPE_OF, OnnxSpec
from lowtide.models.page_buffer import PageBuffer
from lowtide.models.spec import KV_PADDING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TokenCache(ABC):
    """The keys and values of every layer, for one sequence of tokens, in `_buffers`.

    `_slot_bytes` is what one token takes in one head (of graph caches) or in all heads (of `SlotCache`).
    """

    _buffers: list[PageBuffer]

    @abstractmethod
    def truncate(self, num_used: int, num_tokens: int) -> None:
        """Drop the tokens from `num_tokens` on, of `num_used`, and return their pages to the system."""

    def release_pages(self, num_tokens: int) -> None:
        """Return the pages that hold none of the `num_tokens` tokens to the system."""
        self.truncate(num_tokens, num_tokens)

    @abstractmethod
    def blocks(self, num_tokens: int) -> Iterator[memoryview]:
        """Yield writable views of the tokens' bytes, tensor by tensor.

        A view is released when the next one is requested: holding one would keep its buffer from closing.
        """

    @abstractmethod
    def written(self, num_past: int, num_new: int) -> Iterator[NDArray[np.generic]]:
        """Yield what a pass of `num_new` tokens after `num_past` wrote: the keys and the values of each layer in turn.

        It is called before `commit`. The arrays hold the elements in any order, and are read at once.
        """

    def layer_without_numbers(self, num_past: int, num_new: int) -> int | None:
        """Return the first layer to which the last pass wrote a key or a value that is no number."""
        import numpy as np

        for i, values in enumerate(self.written(num_past, num_new)):
            if not np.isfinite(values).all():
                return i // 2
        return None

    def num_bytes(self, num_tokens: int) -> int:
        """Return the bytes of all blocks."""
        return sum(block.nbytes for block in self.blocks(num_tokens))

    def close(self) -> None:
        """Free the buffers; arrays over them must not be read any more."""
        for buffer in self._buffers:
            buffer.close()


class GraphCache(TokenCache):
    """The KV cache of a graph that runs as it is, bound to its session before each pass."""

    def __init__(self, spec: OnnxSpec, context: int) -> None:
        self._heads, self._head_dim = spec.num_kv_heads[0], spec.key_head_dim
        self._slot_bytes = self._head_dim * ELEMENT_BYTES[spec.kv_element]
        self._num_slots = _padded(context)
        self._element = spec.kv_element
        self._names = [
            (past, present)
            for layer in spec.ports.layers
            for past, present in zip(layer.past, layer.present, strict=True)
        ]

    def _make_buffers(self) -> list[PageBuffer]:
        num_bytes = self._heads * self._num_slots * self._slot_bytes
        return [PageBuffer(num_bytes) for _ in self._names]

    def _bind(
        self, binding: Any, past: tuple[str, int, int], present: tuple[str, int, int]
    ) -> None:
        """Bind a tensor; both are a name, an address and the number of tokens there."""
        import numpy as np

        element = np.dtype(self._element)
        for bind, (name, address, num_tokens) in (
            (binding.bind_input, past),
            (binding.bind_output, present),
        ):
            shape = [1, self._heads, num_tokens, self._head_dim]
            bind(name, "cpu", 0, element, shape, address)

    def _written(
        self, buffers: Sequence[PageBuffer], num_slots: int, begin: int, end: int
    ) -> Iterator[NDArray[np.generic]]:
        """Yield the slots from `begin` to `end` of buffers whose heads have `num_slots` slots each."""
        import numpy as np

        shape = (self._heads, num_slots, self._head_dim)
        for buffer in buffers:
            yield array_at(buffer.address, shape, np.dtype(self._element))[:, begin:end]

    @abstractmethod
    def bind(self, binding: Any, num_past: int, num_new: int) -> None:
        """Bind the inputs and outputs of a pass of `num_new` tokens after `num_past`."""

    @abstractmethod
    def commit(self) -> None:
        """Take what the last pass has written as the cache."""


class SharedCache(GraphCache):
    """The graph writes new keys and values behind the past ones, in the same buffer."""

    def __init__(self, spec: OnnxSpec, context: int) -> None:
        super().__init__(spec, context)
        self._buffers = self._make_buffers()
        self._is_bound = False

    def bind(self, binding: Any, num_past: int, num_new: int) -> None:
        """Bind every buffer, once: the attention mask tells the graph how many tokens there are."""
        if self._is_bound:
            return
        for (past, present), buffer in zip(self._names, self._buffers, strict=True):
            address, slots = buffer.address, self._num_slots
            self._bind(binding, (past, address, slots), (present, address, slots))
        self._is_bound = True

    def commit(self) -> None:
        """Do nothing: the new keys and values are in place already."""

    def written(self, num_past: int, num_new: int) -> Iterator[NDArray[np.generic]]:
        """Yield the new slots, which lie behind the past ones."""
        return self._written(self._buffers, self._num_slots, num_past, num_past + num_new)

    def truncate(self, num_used: int, num_tokens: int) -> None:
        """Release the pages of every head behind its first `num_tokens` slots."""
        for buffer, start, end in self._heads_of_buffers():
            buffer.release_pages(start + num_tokens * self._slot_bytes, end)

    def blocks(self, num_tokens: int) -> Iterator[memoryview]:
        """Yield one view per head."""
        for buffer, start, _ in self._heads_of_buffers():
            with buffer.view[start : start + num_tokens * self._slot_bytes] as block:
                yield block

    def _heads_of_buffers(self) -> Iterator[tuple[PageBuffer, int, int]]:
        """Yield each head's buffer, and where it begins and ends there, in bytes."""
        head_bytes = self._num_slots * self._slot_bytes
        for buffer in self._buffers:
            for head in range(self._heads):
                yield buffer, head * head_bytes, (head + 1) * head_bytes


class CopiedCache(GraphCache):
    """Each pass writes a longer copy: two buffers per tensor take turns.

    The heads of a copy lie close together, `num_tokens` slots each.
    """

    def __init__(self, spec: OnnxSpec, context: int) -> None:
        super().__init__(spec, context)
        self._past, self._present = self._make_buffers(), self._make_buffers()
        self._buffers = [*self._past, *self._present]

    def bind(self, binding: Any, num_past: int, num_new: int) -> None:
        """Bind the past buffers as inputs and the present ones as outputs."""
        for (past, present), old, new in zip(self._names, self._past, self._present, strict=True):
            self._bind(
                binding, (past, old.address, num_past), (present, new.address, num_past + num_new)
            )

    def commit(self) -> None:
        """Swap the buffers."""
        self._past, self._present = self._present, self._past

    def written(self, num_past: int, num_new: int) -> Iterator[NDArray[np.generic]]:
        """Yield the new slots of the copy that was written."""
        num_slots = num_past + num_new
        return self._written(self._present, num_slots, num_past, num_slots)

    def truncate(self, num_used: int, num_tokens: int) -> None:
        """Move the heads together and release the other pages, of both copies."""
        before, after = num_used * self._slot_bytes, num_tokens * self._slot_bytes
        for buffer in self._past:
            for head in range(1, self._heads):
                start = head * before
                # Front to back, each head moves to a place that was read before.
                buffer.view[head * after : (head + 1) * after] = buffer.view[start : start + after]
            buffer.release_pages(self._heads * after, buffer.num_bytes)
        for buffer in self._present:
            buffer.release_pages(0, buffer.num_bytes)

    def blocks(self, num_tokens: int) -> Iterator[memoryview]:
        """Yield one view per head."""
        length = num_tokens * self._slot_bytes
        for buffer in self._past:
            for head in range(self._heads):
                with buffer.view[head * length : (head + 1) * length] as block:
                    yield block


class SlotCache(TokenCache):
    """The KV cache that lowtide's attention reads: keys and values of a layer; `kv_type` is f32 or f16."""

    def __init__(
        self, num_layers: int, num_heads: int, head_dim: int, context: int, kv_type: str
    ) -> None:
        import numpy as np

        self.kv_type = kv_type
        self._dtype = np.dtype({kv: element for element, kv in KV_TYPE_OF.items()}[kv_type])
        self._shape = (_padded(context), num_heads, head_dim)
        self._slot_bytes = num_heads * head_dim * self._dtype.itemsize
        self._num_bytes = self._shape[0] * self._slot_bytes
        self._buffers = [PageBuffer(self._num_bytes) for _ in range(2 * num_layers)]

    def tensor(self, layer: int, which: int) -> NDArray[np.generic]:
        """Return a layer's keys (0) or values (1), (slots, kv_heads, head_dim), over the buffer's pages."""
        return array_at(self._buffers[2 * layer + which].address, self._shape, self._dtype)

    def written(self, num_past: int, num_new: int) -> Iterator[NDArray[np.generic]]:
        """Yield the new slots, which lie behind the past ones."""
        for i in range(len(self._buffers)):
            yield self.tensor(*divmod(i, 2))[num_past : num_past + num_new]

    def truncate(self, num_used: int, num_tokens: int) -> None:
        """Release the pages behind the first `num_tokens` slots."""
        for buffer in self._buffers:
            buffer.release_pages(num_tokens * self._slot_bytes, self._num_bytes)

    def blocks(self, num_tokens: int) -> Iterator[memoryview]:
        """Yield one view per tensor."""
        for buffer in self._buffers:
            with buffer.view[: num_tokens * self._slot_bytes] as block:
                yield block


def array_at(
    address: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]
) -> NDArray[np.generic]:
    """Return an array over a buffer's pages; one that exported the buffer's view would keep it from closing."""
    import numpy as np

    num_bytes = prod(shape) * dtype.itemsize
    pages = (ctypes.c_ubyte * num_bytes).from_address(address)
    values: NDArray[np.generic] = np.ctypeslib.as_array(pages).view(dtype)
    return values.reshape(shape)


def _padded(context: int) -> int:
    return -(-context // KV_PADDING) * KV_PADDING


MAGIC, VERSION = b"onnx-kv\0", 1
_HEADER = struct.Struct("<8sII")
"""Magic, version, number of tokens; the token ids follow, four bytes each, and then the blocks."""
_ID_BYTES = array("i").itemsize


def write_cache(path: Path, token_ids: Sequence[int], cache: TokenCache) -> int:
    """Write the tokens with their keys and values; return the file's bytes.

    Raises `SnapshotError` with the system's reason.
    """
    try:
        with path.open("wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, len(token_ids)))
            file.write(array("i", token_ids))
            for block in cache.blocks(len(token_ids)):
                file.write(block)
            return file.tell()
    except OSError as error:
        raise SnapshotError(error.strerror or str(error)) from None


def read_cache(
    path: Path, num_bytes: int, cache: TokenCache, *, num_tokens: int, vocabulary: int
) -> list[int]:
    """Read keys and values of `num_tokens` tokens from the first `num_bytes` of a file; return the tokens.

    Raises `SnapshotError` where the file does not hold exactly these; the cache may then hold anything.
    """
    num_id_bytes = num_tokens * _ID_BYTES
    expected_bytes = _HEADER.size + num_id_bytes + cache.num_bytes(num_tokens)
    try:
        with path.open("rb") as file:
            header = file.read(min(num_bytes, _HEADER.size))
            _check_header(header, num_tokens)
            if num_bytes != expected_bytes:
                raise SnapshotError(f"it has {num_bytes:,} bytes instead of {expected_bytes:,}")
            id_bytes = file.read(num_id_bytes)
            if len(id_bytes) < num_id_bytes:
                raise SnapshotError(f"it ends before its {num_tokens:,} tokens do")
            token_ids = array("i", id_bytes)
            if not all(0 <= token_id < vocabulary for token_id in token_ids):
                raise SnapshotError("it holds tokens that are not in the vocabulary")
            for block in cache.blocks(num_tokens):
                if file.readinto(block) != block.nbytes:
                    raise SnapshotError("it ends before its keys and values do")
    except OSError as error:
        raise SnapshotError(error.strerror or str(error)) from None
    return token_ids.tolist()


def _check_header(header: bytes, num_tokens: int) -> None:
    if len(header) < _HEADER.size or _HEADER.unpack(header)[:2] != (MAGIC, VERSION):
        raise SnapshotError(
            "it is not the KV cache of an ONNX model, or it has another format version"
        )
    num_held = _HEADER.unpack(header)[2]
    if num_held != num_tokens:
        raise SnapshotError(f"it holds {num_held:,} tokens instead of {num_tokens:,}")

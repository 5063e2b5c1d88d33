"""KVPageReclaimer: the KV cache's memory follows the tokens in use.

Pages of cells that hold no token are given back to the system, and read as zeros when they are used again.
Giving back a cell that is in use would corrupt answers without an error, so the cache's layout is held
against its contents before the first page goes. Knows no tokens but their number.

Buffers of llama.cpp that are zero without having been touched, so that only what is used is resident.

llama.cpp writes zeros over a whole new cache. Inside `demand_zero_buffers` the function that clears a buffer
gives its pages back to the system instead, which reads as zeros too. It is reached through private structs
of ggml: they are held against a buffer made for the purpose, and where they do not fit, or the system does
not promise zeros, everything stays as it was. Knows no cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowtide.memory.os.pages import (
    PAGE_BYTES,
    forbid_large_pages,
    release_pages,
    round_down,
    round_up,
)
from lowtide.memory.os.shared_libraries import address_of, library_of
from lowtide.models.gguf.llama_cpp import llama_library

_P = ctypes.c_void_p
_Clear = ctypes.CFUNCTYPE(None, _P, ctypes.c_uint8)
_Allocate = ctypes.CFUNCTYPE(_P, _P, ctypes.c_size_t)


class _Buffer(ctypes.Structure):
    """ggml_backend_buffer, up to what is read."""

    _fields_ = [
        *((name, _P) for name in "free get_base init_tensor memset_tensor set_tensor".split()),
        *((name, _P) for name in "get_tensor set_tensor_2d get_tensor_2d cpy_tensor".split()),
        *((name, _P) for name in "clear reset type base".split()),
        ("num_bytes", ctypes.c_size_t),
    ]


class _BufferType(ctypes.Structure):
    """ggml_backend_buffer_type: six functions, of which two may be missing, and two values."""

    _fields_ = [
        *((name, _P) for name in "get_name allocate get_alignment get_max_size".split()),
        *((name, _P) for name in "get_alloc_size is_host device context".split()),
    ]


@dataclass(frozen=True, slots=True)
class DemandZeroBuffer:
    """Where a cleared buffer lies."""

    address: int
    num_bytes: int


def can_use_demand_zero() -> bool:
    """Whether this system and this llama.cpp allow it."""
    return _patch() is not None


@contextlib.contextmanager
def demand_zero_buffers() -> Iterator[list[DemandZeroBuffer]]:
    """Have what llama.cpp clears inside the block left untouched; yields those buffers.

    A buffer keeps its way of being cleared for as long as it lives. Yields an empty list, for good, where
    that cannot be done.
    """
    patch = _patch()
    if patch is None:
        yield []
        return
    with patch.applied() as cleared:
        yield cleared


@functools.cache
def _patch() -> _Patch | None:
    if sys.platform != "linux":  # elsewhere pages that were given back need not read as zeros
        return None
    patch = _Patch()
    return patch if patch.fits() else None


class _Patch:
    """The one place that writes into ggml's structs."""

    def __init__(self) -> None:
        library = llama_library()
        get_type = ctypes.CFUNCTYPE(_P)(library.address("ggml_backend_cpu_buffer_type"))
        self._type_address = get_type()
        self._type = _BufferType.from_address(self._type_address)
        self._allocate = _Allocate(self._type.allocate)
        # ggml keeps their addresses in buffers that outlive any block: so must this object, in a cache.
        self._our_allocate = _Allocate(self._on_allocate)
        self._our_clear = _Clear(self._on_clear)
        self._lock = threading.RLock()
        self._local = threading.local()

    @contextlib.contextmanager
    def applied(self) -> Iterator[list[DemandZeroBuffer]]:
        cleared: list[DemandZeroBuffer] = []
        with self._lock:
            theirs = self._type.allocate
            self._local.cleared = cleared
            self._type.allocate = address_of(self._our_allocate)
            try:
                yield cleared
            finally:
                self._type.allocate = theirs
                self._local.cleared = None

    def _on_allocate(self, buffer_type: int, num_bytes: int) -> int | None:
        made: int | None = self._allocate(buffer_type, num_bytes)
        if made:
            buffer = _Buffer.from_address(made)
            if buffer.num_bytes == num_bytes and buffer.base:
                buffer.clear = address_of(self._our_clear)
        return made

    def _on_clear(self, address: int, value: int) -> None:
        buffer = _Buffer.from_address(address)
        begin, end = buffer.base, buffer.base + buffer.num_bytes
        first, last = round_up(begin), round_down(end)
        if value != 0 or first >= last or not release_pages(first, last - first):
            ctypes.memset(begin, value, end - begin)
            return
        forbid_large_pages(first, last - first)
        ctypes.memset(begin, 0, first - begin)
        ctypes.memset(last, 0, end - last)
        cleared = getattr(self._local, "cleared", None)
        if cleared is not None:
            cleared.append(DemandZeroBuffer(begin, buffer.num_bytes))

    def fits(self) -> bool:
        """Make a buffer through ggml, clear it through ggml, and see both come through here."""
        allocate = _function("ggml_backend_buft_alloc_buffer", _P, _P, ctypes.c_size_t)
        clear = _function("ggml_backend_buffer_clear", None, _P, ctypes.c_uint8)
        base = _function("ggml_backend_buffer_get_base", _P, _P)
        free = _function("ggml_backend_buffer_free", None, _P)
        num_bytes = 5 * PAGE_BYTES + 64
        if not self._looks_like_a_type():
            return False
        with self.applied() as cleared:
            made = allocate(self._type_address, num_bytes)
            if not made:
                return False
            try:
                clear(made, 0x5A)
                begin = base(made)
                written = ctypes.string_at(begin, num_bytes)
                clear(made, 0)
                zeros = ctypes.string_at(begin, num_bytes)
            finally:
                free(made)
        return (
            written == b"\x5a" * num_bytes
            and zeros == bytes(num_bytes)
            and cleared == [DemandZeroBuffer(begin, num_bytes)]
        )

    def _looks_like_a_type(self) -> bool:
        """Whether functions of one library stand where they should: read before anything is written."""
        fields = [getattr(self._type, name) for name, *_ in _BufferType._fields_]
        libraries = [library_of(field) for field in fields]
        needed, optional, values = libraries[:3] + libraries[5:6], fields[3:5], libraries[6:]
        return (
            None not in needed
            and len(set(needed)) == 1
            and all(field is None or library_of(field) == needed[0] for field in optional)
            and needed[0] not in values
        )


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    return ctypes.CFUNCTYPE(result, *arguments)(llama_library().address(name))


LEAST_CELLS = 64
"""Fewer cells than these are kept: the next tokens take them again at once."""


class KVPageReclaimer:
    """A cache of one sequence whose token i lies in cell i: appended to, and cut at its end.

    The cache is those of `buffers` that hold pairs of tensors, keys and values, of `num_cells` rows of
    `row_bytes`; where they are not `num_tensors` in all, everything is left alone. `num_unused` of them
    are never written to: passes end before their layers. Made before the first token.
    """

    def __init__(
        self,
        buffers: Sequence[DemandZeroBuffer],
        *,
        num_tensors: int,
        num_cells: int,
        row_bytes: int,
        num_unused: int = 0,
    ) -> None:
        self._num_unused = num_unused
        self._row_bytes = row_bytes
        self._num_cells = num_cells
        tensor_bytes = num_cells * row_bytes
        tensors = [
            address
            for buffer in buffers
            if buffer.num_bytes % (2 * tensor_bytes) == 0
            for address in range(buffer.address, buffer.address + buffer.num_bytes, tensor_bytes)
        ]
        self._tensors = tensors if len(tensors) == num_tensors else []
        self._most_used = 0
        self._verified = False

    @property
    def is_working(self) -> bool:
        """Whether pages are given back."""
        return bool(self._tensors)

    def cut(self, num_used: int, num_kept: int) -> None:
        """Give back what lies behind the first `num_kept` cells; `num_used` held tokens until now."""
        self._most_used = max(self._most_used, num_used)
        if self._most_used - num_kept >= LEAST_CELLS:
            self._give_back_behind(num_kept)

    def trim(self, num_used: int) -> None:
        """Give back what lies behind the `num_used` cells that hold tokens, however little it is."""
        if self._most_used > num_used:
            self._give_back_behind(num_used)

    def _give_back_behind(self, num_kept: int) -> None:
        if not self._tensors:
            return
        if not self._verified and not self._is_as_thought():
            self._tensors = []
            return
        self._verified = True
        for address in self._tensors:
            first = round_up(address + num_kept * self._row_bytes)
            last = round_down(address + self._num_cells * self._row_bytes)
            if first < last:
                release_pages(first, last - first)
        self._most_used = num_kept

    def _is_as_thought(self) -> bool:
        """Whether in every tensor the last cell that was used holds something, and no cell behind it does.

        It may be that of a token that was forgotten since: what was written stays until it is given back.
        """
        last, end = self._most_used - 1, min(self._most_used + LEAST_CELLS, self._num_cells)
        used = [address for address in self._tensors if self._holds(address, last)]
        return len(used) == len(self._tensors) - self._num_unused and not any(
            self._holds(address, cell)
            for address in self._tensors
            for cell in range(self._most_used, end)
        )

    def _holds(self, address: int, cell: int) -> bool:
        row = ctypes.string_at(address + cell * self._row_bytes, self._row_bytes)
        return row != bytes(self._row_bytes)

"""KV cache pages: resident only where they hold tokens. KVPageReclaimer and demand-zero KV buffers.

How the KV cache of llama.cpp comes to use memory only for the tokens in it, in two steps:

1. **While loading** (`demand_zero_buffers`). llama.cpp writes zeros over a whole new cache, which makes all
   of it resident. Fresh pages of the system are zero without being written, so the write is unnecessary.
   Inside the block, the pointer `allocate` in ggml's CPU buffer type is replaced, and every buffer allocated
   meanwhile gets a `clear` function of lowtide in its own function table (vtable): it releases the buffer's pages
   with MADV_DONTNEED instead of writing zeros. Both tables are private structs of ggml. So `_Patch.fits`
   first allocates and clears a test buffer through ggml; if anything is unexpected, or the
   system does not promise zeros, nothing is patched and the plan counts the whole cache
   (`ProcessBaseline.kv_on_demand` is False).
2. **While generating** (`KVPageReclaimer`). When the cache is truncated, the pages behind the last token are
   released and read as zeros when they are used again. Releasing a slot that is in use would corrupt answers
   without an error, so the expected layout is checked against the buffer's contents before the first release.

The buffers are made in runtime/backends/gguf.py, which also registers the reclaimer with the model and with
the engine's reclaimers. ONNX models have KV buffers of their own (models/onnx/kv_cache.py).
"""

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
    """The first fields of ggml_backend_buffer, up to the last one that is read here."""

    _fields_ = [
        *((name, _P) for name in "free get_base init_tensor memset_tensor set_tensor".split()),
        *((name, _P) for name in "get_tensor set_tensor_2d get_tensor_2d cpy_tensor".split()),
        *((name, _P) for name in "clear reset type base".split()),
        ("num_bytes", ctypes.c_size_t),
    ]


class _BufferType(ctypes.Structure):
    """ggml_backend_buffer_type: six functions, two of them optional, and two values."""

    _fields_ = [
        *((name, _P) for name in "get_name allocate get_alignment get_max_size".split()),
        *((name, _P) for name in "get_alloc_size is_host device context".split()),
    ]


@dataclass(frozen=True, slots=True)
class DemandZeroBuffer:
    """Address and size of a buffer that was cleared by releasing its pages."""

    address: int
    num_bytes: int


def can_use_demand_zero() -> bool:
    """Whether this system and this build of llama.cpp allow demand-zero buffers."""
    return _patch() is not None


@contextlib.contextmanager
def demand_zero_buffers() -> Iterator[list[DemandZeroBuffer]]:
    """Inside the block, let llama.cpp clear new buffers without touching them; yields these buffers.

    A buffer keeps its clear function for its lifetime. The list stays empty if patching is impossible. The
    module's docstring explains why and how.
    """
    patch = _patch()
    if patch is None:
        yield []
        return
    with patch.applied() as cleared:
        yield cleared


@functools.cache
def _patch() -> _Patch | None:
    if sys.platform != "linux":  # elsewhere, released pages need not read as zeros
        return None
    patch = _Patch()
    return patch if patch.fits() else None


class _Patch:
    """The only code that writes into ggml's structs."""

    def __init__(self) -> None:
        library = llama_library()
        get_type = ctypes.CFUNCTYPE(_P)(library.address("ggml_backend_cpu_buffer_type"))
        self._type_address = get_type()
        self._type = _BufferType.from_address(self._type_address)
        self._allocate = _Allocate(self._type.allocate)
        # Buffers keep the addresses of these functions and outlive the block: `_patch` caches this object.
        self._our_allocate = _Allocate(self._on_allocate)
        self._our_clear = _Clear(self._on_clear)
        self._lock = threading.RLock()
        self._local = threading.local()

    @contextlib.contextmanager
    def applied(self) -> Iterator[list[DemandZeroBuffer]]:
        cleared: list[DemandZeroBuffer] = []
        with self._lock:
            original = self._type.allocate
            self._local.cleared = cleared
            self._type.allocate = address_of(self._our_allocate)
            try:
                yield cleared
            finally:
                self._type.allocate = original
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
        """Allocate and clear a buffer through ggml, and check that both calls arrive here."""
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
        """Whether the table holds functions of one library in the right places; only reads."""
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


MIN_RELEASED_SLOTS = 64
"""`truncate` releases pages only if at least this many slots become free: madvise has a cost."""


class KVPageReclaimer:
    """Releases the pages of a one-sequence KV cache behind its last token; token i lies in slot i.

    The cache consists of those of `buffers` whose size is a multiple of two tensors (keys and values) of
    `num_slots` slots of `token_bytes`. If they are not `num_tensors` tensors in total, nothing is ever
    released. `num_unused` tensors are never written, because passes end before their layers. Create it
    before the first token.
    """

    def __init__(
        self,
        buffers: Sequence[DemandZeroBuffer],
        *,
        num_tensors: int,
        num_slots: int,
        token_bytes: int,
        num_unused: int = 0,
    ) -> None:
        self._num_unused = num_unused
        self._token_bytes = token_bytes
        self._num_slots = num_slots
        tensor_bytes = num_slots * token_bytes
        tensors = [
            address
            for buffer in buffers
            if buffer.num_bytes % (2 * tensor_bytes) == 0
            for address in range(buffer.address, buffer.address + buffer.num_bytes, tensor_bytes)
        ]
        self._tensors = tensors if len(tensors) == num_tensors else []
        self._max_used = 0
        self._verified = False

    def truncate(self, num_used: int, num_tokens: int) -> None:
        """Release the slots behind the first `num_tokens`; `num_used` slots held tokens until now."""
        self._max_used = max(self._max_used, num_used)
        if self._max_used - num_tokens >= MIN_RELEASED_SLOTS:
            self._release_behind(num_tokens)

    def release_pages(self, num_used: int) -> None:
        """Release the slots behind the `num_used` that hold tokens, however few they are."""
        if self._max_used > num_used:
            self._release_behind(num_used)

    def _release_behind(self, num_tokens: int) -> None:
        if not self._tensors:
            return
        if not self._verified and not self._has_expected_layout():
            self._tensors = []
            return
        self._verified = True
        for address in self._tensors:
            first = round_up(address + num_tokens * self._token_bytes)
            last = round_down(address + self._num_slots * self._token_bytes)
            if first < last:
                release_pages(first, last - first)
        self._max_used = num_tokens

    def _has_expected_layout(self) -> bool:
        """Whether every tensor has data in the last used slot and only zeros in the slots behind it.

        The last used slot may be that of a truncated token: its data stays until it is released.
        """
        last, end = self._max_used - 1, min(self._max_used + MIN_RELEASED_SLOTS, self._num_slots)
        used = [address for address in self._tensors if self._has_data(address, last)]
        return len(used) == len(self._tensors) - self._num_unused and not any(
            self._has_data(address, slot)
            for address in self._tensors
            for slot in range(self._max_used, end)
        )

    def _has_data(self, address: int, slot: int) -> bool:
        content = ctypes.string_at(address + slot * self._token_bytes, self._token_bytes)
        return content != bytes(self._token_bytes)

"""LookupTable: drafts that need no model, computed by the native library."""

from __future__ import annotations

import ctypes
import functools
import weakref
from array import array
from collections.abc import Sequence
from typing import Any, Literal

from lowtide.attention.bindings.library import native_library

LookupKind = Literal["ngram", "trigram"]
KINDS: dict[LookupKind, int] = {"ngram": 0, "trigram": 1}
TAIL = 32
"""Tokens at the end of a text that must agree for a new text to count as its continuation. Where another text has the
same end, proposals are worse; answers stay the same."""
ROWS_PER_TOKEN = 3
"""Rows of a proposal for each level: a token and its siblings."""
NO_MEMORY = 1

Rows = tuple[tuple[int, ...], tuple[int, ...], int]
"""Token ids, parents and the class of confidence."""


class LookupTable:
    """Follows a text, and proposes what may come next. Free it with `close`, or let it be collected."""

    def __init__(self, kind: LookupKind) -> None:
        library = _library()
        handle = library.lowtide_lookup_new(KINDS[kind])
        if not handle:
            raise MemoryError("there is no memory for a draft's tables")
        self._handle = handle
        self._advance, self._propose = (
            library.lowtide_lookup_advance,
            library.lowtide_lookup_propose,
        )
        self._free = weakref.finalize(self, library.lowtide_lookup_free, handle)
        self._num_held = 0
        self._rows = self._parents = array("i")
        self._confidence = array("i", [0])
        self._confidence_at = self._confidence.buffer_info()[0]

    def follow(self, token_ids: Sequence[int]) -> None:
        """Move to the end of this text, which continues the one before or is another one."""
        num_held, num_tokens = self._num_held, len(token_ids)
        start = max(num_held - TAIL, 0)
        if num_held <= num_tokens and self._advanced(token_ids[start:], start, whole=False):
            self._num_held = num_tokens
            return
        self._num_held = 0
        self._advanced(token_ids, 0, whole=True)
        self._num_held = num_tokens

    def _advanced(self, token_ids: Sequence[int], start: int, *, whole: bool) -> bool:
        values = array("i", token_ids)
        status = self._advance(self._handle, values.buffer_info()[0], len(values), start, whole)
        if status == NO_MEMORY:
            raise MemoryError("there is no memory for a draft's tables")
        return bool(status == 0)

    def propose(self, num_tokens: int) -> Rows | None:
        """Return rows of at most `num_tokens` levels; None for none."""
        capacity = ROWS_PER_TOKEN * max(num_tokens, 0)
        if len(self._rows) < capacity:
            self._rows, self._parents = array("i", [0]) * capacity, array("i", [0]) * capacity
        size = self._propose(
            self._handle,
            num_tokens,
            self._rows.buffer_info()[0],
            self._parents.buffer_info()[0],
            capacity,
            self._confidence_at,
        )
        if not size:
            return None
        return tuple(self._rows[:size]), tuple(self._parents[:size]), self._confidence[0]

    @property
    def num_bytes(self) -> int:
        """The bytes that the native library holds for it."""
        return int(_library().lowtide_lookup_num_bytes(self._handle))

    def close(self) -> None:
        """Free it. Closing twice is allowed; afterwards it cannot be used."""
        self._free()


@functools.cache
def _library() -> Any:
    library = native_library()
    library.lowtide_lookup_new.restype = ctypes.c_void_p
    library.lowtide_lookup_new.argtypes = [ctypes.c_int]
    library.lowtide_lookup_free.restype = None
    library.lowtide_lookup_free.argtypes = [ctypes.c_void_p]
    library.lowtide_lookup_num_bytes.restype = ctypes.c_size_t
    library.lowtide_lookup_num_bytes.argtypes = [ctypes.c_void_p]
    library.lowtide_lookup_advance.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_int,
    ]
    library.lowtide_lookup_propose.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    return library

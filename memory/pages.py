"""Pages: the system's unit of memory, and how to give some back. Knows no owner."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

PAGE_BYTES = mmap.PAGESIZE


def round_up(num_bytes: int) -> int:
    """To whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def round_down(num_bytes: int) -> int:
    """To whole pages."""
    return num_bytes // PAGE_BYTES * PAGE_BYTES


def give_back(address: int, num_bytes: int) -> bool:
    """Give whole pages back to the system; return whether it took them.

    Private memory reads as zeros then (on Linux), a file's pages come from the file again. `address` begins
    a page.
    """
    return _advise()(address, num_bytes, mmap.MADV_DONTNEED) == 0


@functools.cache
def _advise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    advise: Callable[[int, int, int], int] = function
    return advise

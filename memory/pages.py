"""Pages: the system's unit of memory, and how to give some back. Knows no owner."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

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


def keep_apart(cuts: Sequence[int]) -> bool:
    """Have what is read in one of [cuts[0], cuts[1]), [cuts[1], cuts[2]), ... bring no page of another with
    it; return whether the system took them.

    Linux maps the pages around one that is read, 64 KiB or, since 6.18, a whole large folio of the page
    cache (up to 2 MiB), but none beyond the area of memory that it lies in; alike neighbours are one area,
    so every second one is left out of core dumps. `cuts` are in order and begin pages.
    """
    odd = zip(cuts[1::2], cuts[2::2], strict=False)
    return all(_advise()(begin, end - begin, mmap.MADV_DONTDUMP) == 0 for begin, end in odd)


def keep_small(address: int, num_bytes: int) -> None:
    """Have private memory come page by page, also where the system would give 2 MiB for the first byte."""
    _advise()(address, num_bytes, mmap.MADV_NOHUGEPAGE)


@functools.cache
def _advise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    advise: Callable[[int, int, int], int] = function
    return advise

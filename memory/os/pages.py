"""Memory pages: release them to the operating system, isolate them, and a buffer made of whole pages."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

PAGE_BYTES = mmap.PAGESIZE


def round_up(num_bytes: int) -> int:
    """Return `num_bytes` rounded up to whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def round_down(num_bytes: int) -> int:
    """Return `num_bytes` rounded down to whole pages."""
    return num_bytes // PAGE_BYTES * PAGE_BYTES


def release_pages(address: int, num_bytes: int) -> bool:
    """Release whole pages to the system (madvise MADV_DONTNEED); return whether that worked.

    Afterwards private memory reads as zeros (on Linux), and pages of a file are read from the file again.
    `address` must be the start of a page.
    """
    return _advise()(address, num_bytes, mmap.MADV_DONTNEED) == 0


def isolate_pages(boundaries: Sequence[int]) -> bool:
    """Split a mapping at `boundaries`, so that a page fault in one part maps no page of another part.

    A fault maps the pages around it as well: 64 KiB or, since Linux 6.18, a whole large folio of the page
    cache (up to 2 MiB), but only within one virtual memory area. Neighbouring areas with equal flags are
    merged, so every second part gets another flag (MADV_DONTDUMP). `boundaries` are ascending page
    addresses. Returns whether the system accepted all of them.
    """
    odd = zip(boundaries[1::2], boundaries[2::2], strict=False)
    return all(_advise()(begin, end - begin, mmap.MADV_DONTDUMP) == 0 for begin, end in odd)


def forbid_large_pages(address: int, num_bytes: int) -> None:
    """Allocate private memory page by page, even if the system would map 2 MiB at the first byte."""
    _advise()(address, num_bytes, mmap.MADV_NOHUGEPAGE)


@functools.cache
def _advise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    advise: Callable[[int, int, int], int] = function
    return advise


def trim_heap() -> None:
    """Release the free pages of the C heap, if the C library can do that (glibc's malloc_trim)."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))

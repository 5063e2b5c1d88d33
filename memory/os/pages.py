"""Pages: the system's unit of memory, and how to give some back. Knows no owner.

PageBuffer: bytes that come from the system page by page, and go back to it as soon as they are closed.

Memory of the heap would lie between other blocks and might stay resident when it is freed. Knows no owner.

The C library's heap, as far as it can be asked to give back what is free. Knows no owner."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

PAGE_BYTES = mmap.PAGESIZE


def round_up(num_bytes: int) -> int:
    """To whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def round_down(num_bytes: int) -> int:
    """To whole pages."""
    return num_bytes // PAGE_BYTES * PAGE_BYTES


def release_pages(address: int, num_bytes: int) -> bool:
    """Give whole pages back to the system; return whether it took them.

    Private memory reads as zeros then (on Linux), a file's pages come from the file again. `address` begins
    a page.
    """
    return _advise()(address, num_bytes, mmap.MADV_DONTNEED) == 0


def isolate_pages(cuts: Sequence[int]) -> bool:
    """Have what is read in one of [cuts[0], cuts[1]), [cuts[1], cuts[2]), ... bring no page of another with
    it; return whether the system took them.

    Linux maps the pages around one that is read, 64 KiB or, since 6.18, a whole large folio of the page
    cache (up to 2 MiB), but none beyond the area of memory that it lies in; alike neighbours are one area,
    so every second one is left out of core dumps. `cuts` are in order and begin pages.
    """
    odd = zip(cuts[1::2], cuts[2::2], strict=False)
    return all(_advise()(begin, end - begin, mmap.MADV_DONTDUMP) == 0 for begin, end in odd)


def forbid_large_pages(address: int, num_bytes: int) -> None:
    """Have private memory come page by page, also where the system would give 2 MiB for the first byte."""
    _advise()(address, num_bytes, mmap.MADV_NOHUGEPAGE)


@functools.cache
def _advise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    advise: Callable[[int, int, int], int] = function
    return advise


class PageBuffer:
    """`view` is its memory, zeros at first. Raises `MemoryError` where the system has none."""

    def __init__(self, num_bytes: int) -> None:
        try:
            self._pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{num_bytes:,} bytes: {error.strerror}") from None
        if sys.platform == "linux":  # a huge page could reach into a neighbour's untouched memory
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._pages.madvise(mmap.MADV_NOHUGEPAGE)
        self.view = memoryview(self._pages)
        self.num_bytes = round_up(num_bytes)
        """What is resident once it is written, in whole pages."""

    def close(self) -> None:
        """Give the pages back; parts of the view must have been released. Closing twice is allowed."""
        self.view.release()
        self._pages.close()


def trim_heap() -> None:
    """Give back the free pages of every arena, where the C library can (glibc); else nothing."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))

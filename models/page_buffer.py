"""PageBuffer: memory that comes from the system page by page and returns to it when it is released.

On the C library's heap such memory would lie between other blocks and might stay resident once freed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys

_IS_LINUX = sys.platform == "linux"


class PageBuffer:
    """`num_bytes` bytes of zeros; untouched pages take no memory (on Linux).

    `view` is the memory and `address` where it begins. Raises `MemoryError` where the system has none.
    """

    def __init__(self, num_bytes: int) -> None:
        try:
            self._pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"cannot map {num_bytes:,} bytes: {error.strerror}") from None
        if _IS_LINUX:  # a huge page could reach into a neighbour's untouched memory
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._pages.madvise(mmap.MADV_NOHUGEPAGE)
        self.view = memoryview(self._pages)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        self.num_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        """What is resident once everything is written: whole pages."""

    def release_pages(self, start: int, end: int) -> None:
        """Return the whole pages inside bytes [start, end) to the system; they read as zeros again."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if _IS_LINUX and length > 0:
            self._pages.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Free the memory; slices of `view` must have been released. Closing twice is allowed."""
        self.view.release()
        self._pages.close()

"""KvBuffer: one tensor of a KV cache, in pages that follow its use. Knows no graph."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys

CELL_STEP = 256
"""Cells of a buffer are a multiple of this: then a head's begin with a page, in every head size."""
_IS_LINUX = sys.platform == "linux"


class KvBuffer:
    """Room for `num_cells` cells of `num_heads` heads; untouched pages take no memory (on Linux)."""

    def __init__(self, num_heads: int, num_cells: int, row_bytes: int) -> None:
        self.num_heads = num_heads
        self.num_cells = -(-num_cells // CELL_STEP) * CELL_STEP
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

"""PageBuffer: bytes that come from the system page by page, and go back to it as soon as they are closed.

Memory of the heap would lie between other blocks and might stay resident when it is freed. Knows no owner.
"""

from __future__ import annotations

import contextlib
import mmap
import sys

from lowtide.memory.pages import round_up


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

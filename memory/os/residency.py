"""How much memory of this process is resident: in total, of files, of buffers.

Reads the counters of Linux, cheaply enough to call during a generation. Elsewhere only the total is known.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowtide.memory.os.kv_pages import DemandZeroBuffer
from lowtide.memory.os.pages import PAGE_BYTES, round_down
from lowtide.memory.process import read_process_memory

CHUNK_PAGES = 16384
"""Pages per mincore call; a larger result buffer would itself show in the measurement."""


@dataclass(frozen=True, slots=True)
class ResidentMemory:
    """Bytes that are resident now: anonymous memory, and pages of files."""

    anonymous_bytes: int
    file_bytes: int

    @property
    def num_bytes(self) -> int:
        """The resident set: the sum of both."""
        return self.anonymous_bytes + self.file_bytes


class ResidentMemoryMeter:
    """Reads the resident set in a few microseconds; `separates_files` is whether file pages are separate."""

    def __init__(self) -> None:
        self.separates_files = sys.platform == "linux"
        self._counters: int | None = None
        if self.separates_files:
            self._counters = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> ResidentMemory:
        """Return the resident bytes; all count as anonymous if file pages are not counted separately."""
        if self._counters is None:
            return ResidentMemory(read_process_memory().resident_bytes, 0)
        fields = os.pread(self._counters, 128, 0).split()
        resident, of_files = int(fields[1]) * PAGE_BYTES, int(fields[2]) * PAGE_BYTES
        return ResidentMemory(resident - of_files, of_files)

    def close(self) -> None:
        """Close the counters; closing twice is allowed."""
        if self._counters is not None:
            os.close(self._counters)
            self._counters = None
            self.separates_files = False


def resident_file_bytes(paths: Iterable[Path]) -> int | None:
    """Return how many bytes of the files are mapped and resident here; None if the system cannot say.

    Reads every mapping of the process, which takes milliseconds in a large process.
    """
    names = {os.fsencode(path.resolve()) for path in paths}
    total, is_counted = 0, False
    try:
        with open("/proc/self/smaps", "rb") as lines:
            for line in lines:
                if line.startswith(b"Rss:"):
                    total += int(line.split()[1]) << 10 if is_counted else 0
                elif not line[0:1].isupper():
                    parts = line.rstrip(b"\n").split(maxsplit=5)
                    is_counted = len(parts) == 6 and parts[5] in names
    except OSError:
        return None
    return total


def resident_buffer_bytes(buffers: Sequence[DemandZeroBuffer]) -> int | None:
    """Return how many bytes of the buffers are resident; None if the system cannot say."""
    is_resident = _mincore()
    if is_resident is None:
        return None
    pages = ctypes.create_string_buffer(CHUNK_PAGES)
    num_pages = 0
    for buffer in buffers:
        end = buffer.address + buffer.num_bytes
        start = round_down(buffer.address)
        for address in range(start, end, CHUNK_PAGES * PAGE_BYTES):
            count = min(-(-(end - address) // PAGE_BYTES), CHUNK_PAGES)
            if is_resident(address, count * PAGE_BYTES, pages) != 0:
                return None
            num_pages += count - pages.raw[:count].count(b"\0")
    return num_pages * PAGE_BYTES


@functools.cache
def _mincore() -> Callable[[int, int, ctypes.Array[ctypes.c_char]], int] | None:
    """The system's mincore, or None if it reports anonymous pages wrongly."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).mincore
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    with contextlib.closing(mmap.mmap(-1, 4 * PAGE_BYTES, flags=mmap.MAP_PRIVATE)) as probe:
        probe[0] = 1
        probe[PAGE_BYTES] = 1
        pages = ctypes.create_string_buffer(4)
        handle = ctypes.c_char.from_buffer(probe)
        error = function(ctypes.addressof(handle), 4 * PAGE_BYTES, pages)
        del handle
    if error != 0 or pages.raw != b"\1\1\0\0":
        return None
    mincore: Callable[[int, int, ctypes.Array[ctypes.c_char]], int] = function
    return mincore

"""What of this process is resident: in all, of files, of buffers; cheap enough to ask while it works.

Reads the counters of Linux; elsewhere only the whole is known. Knows no owner.
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
"""Pages asked about at once: what asking takes must not show in the answer."""


@dataclass(frozen=True, slots=True)
class ResidentMemory:
    """Bytes resident now: anonymous ones, and pages of files."""

    anonymous_bytes: int
    file_bytes: int

    @property
    def num_bytes(self) -> int:
        """Both together: the resident set."""
        return self.anonymous_bytes + self.file_bytes


class ResidentMemoryMeter:
    """Reads the resident set in a few microseconds; `tells_files` says whether files are told apart."""

    def __init__(self) -> None:
        self.tells_files = sys.platform == "linux"
        self._counters: int | None = None
        if self.tells_files:
            self._counters = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> ResidentMemory:
        """Return what is resident; all of it counts as anonymous where files are not told apart."""
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
            self.tells_files = False


def resident_file_bytes(paths: Iterable[Path]) -> int | None:
    """Return how much of the files is mapped and resident in this process; None where nobody says.

    Walks every mapping of the process: milliseconds for a large one.
    """
    wanted = {os.fsencode(path.resolve()) for path in paths}
    total, is_wanted = 0, False
    try:
        with open("/proc/self/smaps", "rb") as lines:
            for line in lines:
                if line.startswith(b"Rss:"):
                    total += int(line.split()[1]) << 10 if is_wanted else 0
                elif not line[0:1].isupper():
                    parts = line.rstrip(b"\n").split(maxsplit=5)
                    is_wanted = len(parts) == 6 and parts[5] in wanted
    except OSError:
        return None
    return total


def resident_buffer_bytes(buffers: Sequence[DemandZeroBuffer]) -> int | None:
    """Return how much of the buffers is resident; None where the system does not say."""
    is_resident = _mincore()
    if is_resident is None:
        return None
    pages = ctypes.create_string_buffer(CHUNK_PAGES)
    num_pages = 0
    for buffer in buffers:
        end = buffer.address + buffer.num_bytes
        start = round_down(buffer.address)
        for address in range(start, end, CHUNK_PAGES * PAGE_BYTES):
            asked = min(-(-(end - address) // PAGE_BYTES), CHUNK_PAGES)
            if is_resident(address, asked * PAGE_BYTES, pages) != 0:
                return None
            num_pages += asked - pages.raw[:asked].count(b"\0")
    return num_pages * PAGE_BYTES


@functools.cache
def _mincore() -> Callable[[int, int, ctypes.Array[ctypes.c_char]], int] | None:
    """The system's function, where it answers of anonymous pages as it should."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).mincore
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    with contextlib.closing(mmap.mmap(-1, 4 * PAGE_BYTES, flags=mmap.MAP_PRIVATE)) as probe:
        probe[0] = 1
        probe[PAGE_BYTES] = 1
        pages = ctypes.create_string_buffer(4)
        handle = ctypes.c_char.from_buffer(probe)
        told = function(ctypes.addressof(handle), 4 * PAGE_BYTES, pages)
        del handle
    if told != 0 or pages.raw != b"\1\1\0\0":
        return None
    answer: Callable[[int, int, ctypes.Array[ctypes.c_char]], int] = function
    return answer

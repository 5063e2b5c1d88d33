"""Memory-mapped model files: where they are mapped, and in which folio sizes the page cache holds them.

Two things about mapped weights surprise:

* **mmap without MAP_POPULATE.** llama.cpp maps a model with MAP_POPULATE, which makes every weight resident
  at once. When weights are streamed (`resident_layers` of the plan), that alone would exceed the budget. So
  the native library intercepts llama.cpp's call of mmap and removes the flag while such a model is loaded
  (`lazy_mappings` in attention/bindings/library.py); each layer is read when it is used and its pages are
  released afterwards.
* **Large folios.** The page cache holds pages that were written, or read at random, in small folios, and a
  file that was read from beginning to end in large ones. Mapping and releasing 200 MiB took 12 to 25 ms in
  small folios and 1 to 5 ms in large ones (two threads, Linux 6.18, ext4). `use_large_folios` therefore
  rereads a file that is streamed again and again (called in runtime/backends/gguf.py).

Works on Linux. Elsewhere no mapping is found, and folios are left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lowtide.memory.os import pages
from lowtide.memory.os.pages import PAGE_BYTES

MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, slots=True)
class FileMap:
    """A mapping of bytes [offset, offset + num_bytes) of a file at `address`."""

    address: int
    num_bytes: int
    offset: int
    is_readable: bool = True


def read_file_maps(path: Path, maps: Path = MAPS) -> frozenset[FileMap]:
    """Return the mappings of the file in this process."""
    try:
        target = os.stat(path)
        lines = maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    found = (_file_map(line, target) for line in lines)
    return frozenset(file_map for file_map in found if file_map is not None)


def release_pages(file_map: FileMap) -> None:
    """Release the pages of a mapping that is never written; later reads fetch them from the file again."""
    pages.release_pages(file_map.address, file_map.num_bytes)


def _file_map(line: str, target: os.stat_result) -> FileMap | None:
    """Parse a line of /proc/self/maps: address range, permissions, offset, device, inode, path."""
    fields = line.split(maxsplit=5)
    if len(fields) < 5 or int(fields[4]) != target.st_ino:
        return None
    major, minor = (int(part, 16) for part in fields[3].split(":"))
    if (major, minor) != (os.major(target.st_dev), os.minor(target.st_dev)):
        return None
    begin, end = (int(part, 16) for part in fields[0].split("-"))
    return FileMap(begin, end - begin, int(fields[2], 16), is_readable=fields[1].startswith("r"))


AROUND_PAGES = (64 << 10) // PAGE_BYTES
"""How many pages Linux maps around a page fault if the folios are small."""
NUM_SAMPLES = 24
WINDOW_PAGES = (4 << 20) // PAGE_BYTES
"""The largest folio that can contain a page, on either side of the page."""
PROBE_BYTES = 16 << 20
"""How much of a file is reread to measure the speed of the disk."""
CHUNK_BYTES = 256 << 10
"""Size of the read buffer, the only memory that rereading allocates."""
MIN_BYTES_PER_S = 150 << 20
"""A slower disk takes longer to reread the file than large folios save in an answer."""
MIN_KERNEL = (6, 18)
"""Since this version of Linux a page fault maps the whole folio, which reveals the folio's size."""


def use_large_folios(paths: Iterable[Path], available_bytes: int) -> None:
    """Make the page cache hold the files in large folios, for files that are mapped and released repeatedly.

    Does nothing if the folios are large already or their size is unknown, or if the files do not fit twice
    into the available memory: inside a control group, rereading charges the pages to this group.
    """
    with contextlib.suppress(OSError):
        files = [(path, path.stat().st_size) for path in paths]
        if 2 * sum(num_bytes for _, num_bytes in files) > available_bytes:
            return
        for path, _ in files:
            if has_small_folios(path):
                reread_file(path)


def has_small_folios(path: Path) -> bool:
    """Whether a page fault maps 64 KiB of the file or less in most places; False if that is unknown.

    Reads a few pages. At most one folio is resident at a time.
    """
    if not _reveals_folios():
        return False
    try:
        with path.open("rb") as file, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes < NUM_SAMPLES * PAGE_BYTES:
                return False
            with mmap.mmap(file.fileno(), num_bytes, flags=mmap.MAP_PRIVATE) as view:
                sizes = _sampled_folios(view, pagemap.fileno())
    except (OSError, ValueError):
        return False
    return sorted(sizes)[len(sizes) // 2] <= AROUND_PAGES


def reread_file(path: Path, clock: Callable[[], float] = time.monotonic) -> int:
    """Drop the file from the page cache and read it from the beginning; return how many bytes were read.

    On a slow disk only the first `PROBE_BYTES` are reread. Pages that another process maps, and pages that
    are not yet written to the disk, stay as they are.
    """
    buffer = memoryview(bytearray(CHUNK_BYTES))
    done = 0
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        for stop in (min(PROBE_BYTES, end), end):
            started = clock()
            os.posix_fadvise(file.fileno(), done, stop - done, os.POSIX_FADV_DONTNEED)
            while done < stop and (num_read := file.readinto(buffer)):
                done += num_read
            if (clock() - started) * MIN_BYTES_PER_S > PROBE_BYTES:
                break
    return done


def _reveals_folios() -> bool:
    if sys.platform != "linux":
        return False
    with contextlib.suppress(ValueError):
        major, minor = os.uname().release.split("-")[0].split(".")[:2]
        return (int(major), int(minor)) >= MIN_KERNEL
    return False


def _sampled_folios(view: mmap.mmap, pagemap: int) -> list[int]:
    """Return the number of pages that a fault maps, at a few places of the file."""
    address = _address_of(view)
    num_pages = len(view) // PAGE_BYTES
    sizes = []
    for sample in range(NUM_SAMPLES):
        page = num_pages * (2 * sample + 1) // (2 * NUM_SAMPLES)
        view[page * PAGE_BYTES]
        first, last = max(page - WINDOW_PAGES, 0), min(page + WINDOW_PAGES, num_pages)
        begin = address // PAGE_BYTES + first
        entries = os.pread(pagemap, 8 * (last - first), 8 * begin)
        sizes.append(sum(entry >> 7 for entry in entries[7::8]))  # bit 63: the page is present
        view.madvise(mmap.MADV_DONTNEED)
    return sizes


def _address_of(view: mmap.mmap) -> int:
    exported = ctypes.c_char.from_buffer(view)
    address = ctypes.addressof(exported)
    del exported  # a mapping with an exported view cannot be closed
    return address

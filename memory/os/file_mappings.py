"""Where a file is mapped in this process, as the system tells it. Linux; elsewhere nothing is found.

In how large pieces the system's page cache holds a file, and having it hold the file in larger ones.

Pages that were written, or read here and there, lie in small pieces; what is read from its beginning to its
end in large ones. Mapping and letting go of 200 MiB in small pieces took 12 to 25 ms, in large ones 1 to 5
(measured with two threads, Linux 6.18, ext4). Knows no model."""

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
    """Bytes [offset, offset + num_bytes) of the file lie at `address`."""

    address: int
    num_bytes: int
    offset: int
    is_readable: bool = True


def read_file_maps(path: Path, maps: Path = MAPS) -> frozenset[FileMap]:
    """Return where the file is mapped; one that was mapped twice is there twice."""
    try:
        wanted = os.stat(path)
        lines = maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    found = (_file_map(line, wanted) for line in lines)
    return frozenset(file_map for file_map in found if file_map is not None)


def release_pages(file_map: FileMap) -> None:
    """Let go of the map's pages; what is read of them later comes from the file again.

    Only for a map that is never written to.
    """
    pages.release_pages(file_map.address, file_map.num_bytes)


def _file_map(line: str, wanted: os.stat_result) -> FileMap | None:
    """Read one line: address range, permissions, offset, device, inode, path."""
    fields = line.split(maxsplit=5)
    if len(fields) < 5 or int(fields[4]) != wanted.st_ino:
        return None
    major, minor = (int(part, 16) for part in fields[3].split(":"))
    if (major, minor) != (os.major(wanted.st_dev), os.minor(wanted.st_dev)):
        return None
    begin, end = (int(part, 16) for part in fields[0].split("-"))
    return FileMap(begin, end - begin, int(fields[2], 16), is_readable=fields[1].startswith("r"))


AROUND_PAGES = (64 << 10) // PAGE_BYTES
"""What Linux maps with a page that is read, where the pieces are small."""
NUM_SAMPLES = 24
WINDOW_PAGES = (4 << 20) // PAGE_BYTES
"""The largest piece that a page may lie in, on either side of it."""
TRIED_BYTES = 16 << 20
CHUNK_BYTES = 256 << 10
"""Read at once, and all that reading anew takes of memory."""
SLOWEST_BYTES_PER_S = 150 << 20
"""Below this, over the first `TRIED_BYTES`, what the disk takes is not earned back within an answer."""
FIRST_TOLD = (6, 18)
"""Since this Linux a page that is read brings its whole piece, which tells how large that is."""


def use_large_folios(paths: Iterable[Path], available_bytes: int) -> None:
    """Have the page cache hold files, which are mapped and let go of again and again, in large pieces.

    Does nothing where it does so already or does not tell, or where the files have not room twice in what
    is available: a control group's limit would have to hold what was another's before.
    """
    with contextlib.suppress(OSError):
        files = [(path, path.stat().st_size) for path in paths]
        if 2 * sum(num_bytes for _, num_bytes in files) > available_bytes:
            return
        for path, _ in files:
            if has_small_folios(path):
                reread_file(path)


def has_small_folios(path: Path) -> bool:
    """Whether most of the cached file is mapped 64 KiB at a time; False where the system does not tell.

    Reads a few pages. At most one piece is resident at a time.
    """
    if not _tells_pieces():
        return False
    try:
        with path.open("rb") as file, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes < NUM_SAMPLES * PAGE_BYTES:
                return False
            with mmap.mmap(file.fileno(), num_bytes, flags=mmap.MAP_PRIVATE) as view:
                pieces = _sampled_pieces(view, pagemap.fileno())
    except (OSError, ValueError):
        return False
    return sorted(pieces)[len(pieces) // 2] <= AROUND_PAGES


def reread_file(path: Path, clock: Callable[[], float] = time.monotonic) -> int:
    """Have the page cache drop the file and read it from its beginning; return the bytes that were read.

    Where the disk is slow only the first step is. What another process maps, or what has yet to be written,
    stays as it is.
    """
    buffer = memoryview(bytearray(CHUNK_BYTES))
    done = 0
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        for stop in (min(TRIED_BYTES, end), end):
            started = clock()
            os.posix_fadvise(file.fileno(), done, stop - done, os.POSIX_FADV_DONTNEED)
            while done < stop and (num_read := file.readinto(buffer)):
                done += num_read
            if (clock() - started) * SLOWEST_BYTES_PER_S > TRIED_BYTES:
                break
    return done


def _tells_pieces() -> bool:
    if sys.platform != "linux":
        return False
    with contextlib.suppress(ValueError):
        major, minor = os.uname().release.split("-")[0].split(".")[:2]
        return (int(major), int(minor)) >= FIRST_TOLD
    return False


def _sampled_pieces(view: mmap.mmap, pagemap: int) -> list[int]:
    """How many pages each of a few pages of the map brings with it."""
    address = _address_of(view)
    num_pages = len(view) // PAGE_BYTES
    pieces = []
    for sample in range(NUM_SAMPLES):
        page = num_pages * (2 * sample + 1) // (2 * NUM_SAMPLES)
        view[page * PAGE_BYTES]
        first, last = max(page - WINDOW_PAGES, 0), min(page + WINDOW_PAGES, num_pages)
        begin = address // PAGE_BYTES + first
        entries = os.pread(pagemap, 8 * (last - first), 8 * begin)
        pieces.append(sum(entry >> 7 for entry in entries[7::8]))  # bit 63: it is present
        view.madvise(mmap.MADV_DONTNEED)
    return pieces


def _address_of(view: mmap.mmap) -> int:
    exported = ctypes.c_char.from_buffer(view)
    address = ctypes.addressof(exported)
    del exported  # a map with a view on it cannot be closed
    return address

"""Code of libraries in this process: whose it is, reading it in before memory is measured, and letting go
of what was only read while a library was loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lowtide.memory.os import pages
from lowtide.memory.os.file_mappings import read_file_maps
from lowtide.memory.os.pages import PAGE_BYTES

SMAPS = Path("/proc/self/smaps")
READ_WHILE_LOADED = (b"libcrypto", b"openblas", b"libgfortran", b"libquadmath")
"""Parts of the names of libraries that come with Python's hashes and with numpy: 5 MiB of tables and code
are read as they are loaded. Hashing needs 0.7 of that again; answers multiply no matrix in numpy.
"""


class _SymbolInfo(ctypes.Structure):
    """What dladdr says of an address."""

    _fields_ = [
        ("library", ctypes.c_char_p),
        ("library_base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def address_of(function: Any) -> int:
    """Return the address of a C function that ctypes knows, found in a library or made of ours."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def library_of(address: int | None) -> bytes | None:
    """Return the path of the library whose loaded image an address lies in."""
    info = _SymbolInfo()
    find = ctypes.CDLL(None).dladdr
    find.argtypes = [ctypes.c_void_p, ctypes.POINTER(_SymbolInfo)]
    if not address or not find(address, ctypes.byref(info)):
        return None
    library: bytes | None = info.library
    return library


def fault_in(address: int) -> None:
    """Make the whole library resident that `address` lies in, where the system tells where that is.

    Which of its pages come by themselves differs from machine to machine: with one that is wanted, Linux
    maps what else of the file the page cache holds in one piece.
    """
    library = library_of(address)
    if library is None:
        return
    for file_map in read_file_maps(Path(os.fsdecode(library))):
        if file_map.is_readable:
            for page in range(file_map.address, file_map.address + file_map.num_bytes, PAGE_BYTES):
                ctypes.string_at(page, 1)


def release_startup_pages(smaps: Path = SMAPS) -> None:
    """Let go of pages of the libraries that `READ_WHILE_LOADED` names; what is wanted of them comes again.

    Only of code and tables that nobody may write to and that are still the file's: others, such as tables
    with addresses in them, would be lost. For a small process: a larger one may be using such pages.
    """
    with contextlib.suppress(OSError, ValueError):
        for begin, num_bytes in list(_unwritten_areas(smaps, READ_WHILE_LOADED)):
            pages.release_pages(begin, num_bytes)


def _unwritten_areas(smaps: Path, names: Collection[bytes]) -> Iterator[tuple[int, int]]:
    """Yield where such libraries lie, and how many bytes, in areas without a page that is private."""
    area = None
    with smaps.open("rb") as lines:
        for line in lines:
            if not line[:1].isupper():
                area = _read_only_area(line, names)
            elif line.startswith(b"Anonymous:") and area is not None and int(line.split()[1]) == 0:
                yield area


def _read_only_area(line: bytes, names: Collection[bytes]) -> tuple[int, int] | None:
    parts = line.rstrip(b"\n").split(maxsplit=5)
    is_one = len(parts) == 6 and any(name in parts[5].rpartition(b"/")[2] for name in names)
    if not is_one or b"w" in parts[1] or not parts[1].endswith(b"p"):
        return None
    begin, _, end = parts[0].partition(b"-")
    return int(begin, 16), int(end, 16) - int(begin, 16)

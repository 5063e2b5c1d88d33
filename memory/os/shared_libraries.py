"""Resident pages of shared libraries, put into a known state before the process is measured.

The plan measures this process once, before a model is loaded, and takes the result as the size of
"interpreter and libraries" (runtime/backends/gguf_baseline.py, `measured_baseline`). Library code, however, becomes
resident page by page, as it runs: code that runs first after the measurement would grow the process beyond
the plan. And pages that only the loading of a library needed would be measured although nobody reads them
again. So the order is:

1. import every module that an answer needs (`MODULE_BYTES` in runtime/backends/gguf_baseline.py);
2. `release_startup_pages`: drop the pages that only loading has read;
3. `fault_in`: make the kernels' libraries resident as a whole;
4. run each module's `preload` (runtime/generation/sampling.py), which touches the numpy code that sampling
   uses. It comes after step 2, which would drop these pages again.
5. Only now measure.

A new dependency of the answer path must be touched in step 1, 3 or 4, or the plan becomes too small.
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
from lowtide.memory.os.pages import PAGE_BYTES, round_down

SMAPS = Path("/proc/self/smaps")
READ_WHILE_LOADED = (b"libcrypto", b"openblas", b"libgfortran", b"libquadmath")
"""Libraries of Python's hashlib and of numpy, by parts of their file names. Loading them reads 5 MiB of
tables and code. Hashing needs 0.7 MiB of that again; an answer runs no matrix multiplication in numpy.
"""


class _SymbolInfo(ctypes.Structure):
    """The result of dladdr for an address."""

    _fields_ = [
        ("library", ctypes.c_char_p),
        ("library_base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def address_of(function: Any) -> int:
    """Return the address of a ctypes function, from a library or made from a Python callback."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def library_of(address: int | None) -> bytes | None:
    """Return the path of the shared library that contains an address, None if no library does."""
    info = _SymbolInfo()
    find = ctypes.CDLL(None).dladdr
    find.argtypes = [ctypes.c_void_p, ctypes.POINTER(_SymbolInfo)]
    if not address or not find(address, ctypes.byref(info)):
        return None
    library: bytes | None = info.library
    return library


def fault_in(address: int, until: int | None = None) -> None:
    """Make the library that contains `address` resident, if the system says where it is mapped.

    With `until` only the pages from `address` to `until` become resident: for a library that holds much else.
    Without this, the number of resident pages differs from machine to machine: a page fault also maps the
    neighbours that the page cache holds in the same folio.
    """
    library = library_of(address)
    if library is None:
        return
    for file_map in read_file_maps(Path(os.fsdecode(library))):
        begin, end = file_map.address, file_map.address + file_map.num_bytes
        if until is not None:
            begin, end = max(begin, round_down(address)), min(end, until + 1)
        if file_map.is_readable:
            for page in range(begin, end, PAGE_BYTES):
                ctypes.string_at(page, 1)


def release_startup_pages(smaps: Path = SMAPS) -> None:
    """Release the pages of the libraries in `READ_WHILE_LOADED`; a later use reads them again.

    Releases only read-only areas without private pages: relocated tables, for example, would be lost. Call
    it in a small process only; a larger program may be using these pages.
    """
    with contextlib.suppress(OSError, ValueError):
        for begin, num_bytes in list(_unwritten_areas(smaps, READ_WHILE_LOADED)):
            pages.release_pages(begin, num_bytes)


def _unwritten_areas(smaps: Path, names: Collection[bytes]) -> Iterator[tuple[int, int]]:
    """Yield address and size of the areas of such libraries that have no private page."""
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

"""Mappings of a file that are made private, so that they can be changed in memory and the file stays as it is.

llama.cpp maps a model's file shared and read-only. A private mapping of the same bytes at the same address has the same
content; a page that is written becomes memory of this process alone. Works on Linux, as `read_file_maps` does.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowtide.memory.os.file_mappings import FileMap

MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value


def make_private(path: Path, maps: Iterable[FileMap]) -> None:
    """Map the same bytes of the file at the same addresses again: private, and writable.

    Raises `OSError` where the system refuses it. Nothing may use the mappings meanwhile.
    """
    library = _library()
    with path.open("rb") as file:
        for file_map in maps:
            address = library.mmap(
                file_map.address,
                file_map.num_bytes,
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_PRIVATE | MAP_FIXED,
                file.fileno(),
                file_map.offset,
            )
            if address == _FAILED:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(path))


def make_read_only(maps: Iterable[FileMap]) -> None:
    """Refuse further writes to the mappings."""
    for file_map in maps:
        _library().mprotect(file_map.address, file_map.num_bytes, mmap.PROT_READ)


def address_in(maps: Iterable[FileMap], offset: int, num_bytes: int) -> int | None:
    """Return where bytes [offset, offset + num_bytes) of the file are mapped; None where no mapping has all of them."""
    for file_map in maps:
        moved = offset - file_map.offset
        if moved >= 0 and moved + num_bytes <= file_map.num_bytes:
            return file_map.address + moved
    return None


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    library.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library

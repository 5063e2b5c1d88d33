"""Code of libraries in this process: whose it is, and reading it in before memory is measured."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from lowtide.memory.file_maps import read_file_maps
from lowtide.memory.pages import PAGE_BYTES


class _SymbolInfo(ctypes.Structure):
    """What dladdr says of an address."""

    _fields_ = [
        ("library", ctypes.c_char_p),
        ("library_base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def library_of(address: int | None) -> bytes | None:
    """Return the path of the library whose loaded image an address lies in."""
    info = _SymbolInfo()
    find = ctypes.CDLL(None).dladdr
    find.argtypes = [ctypes.c_void_p, ctypes.POINTER(_SymbolInfo)]
    if not address or not find(address, ctypes.byref(info)):
        return None
    library: bytes | None = info.library
    return library


def read_in(address: int) -> None:
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

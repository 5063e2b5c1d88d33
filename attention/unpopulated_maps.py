"""Lets llama.cpp map a model's file without reading it whole, so that only what is used is resident.

llama.cpp asks for its mapping to be filled at once, and has no option against it. Inside
`unpopulated_maps` that wish is left out, by way of the table through which its library calls mmap
(`native/unpopulated_maps.cpp`). Linux on 64 bits; where the table is not as we know it nothing is changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

from lowtide.attention.native_library import native_library
from lowtide.models.llama_library import llama_library


@functools.cache
def can_leave_unpopulated() -> bool:
    """Whether llama.cpp's maps can be left unfilled here."""
    with unpopulated_maps() as works:
        return works


@contextlib.contextmanager
def unpopulated_maps() -> Iterator[bool]:
    """Leave what llama.cpp maps on this thread unfilled; yields whether that works."""
    library = native_library()
    enter = library.lowtide_enter_unpopulated_maps
    enter.argtypes, enter.restype = [ctypes.c_void_p], ctypes.c_int
    works = bool(enter(llama_library().address("llama_model_load_from_file")))
    try:
        yield works
    finally:
        if works:
            library.lowtide_leave_unpopulated_maps()

"""Keeps ggml's failed assertions from ending the process while a model is loaded.

A header with numbers that no model has makes llama.cpp assert, and ggml's answer to that is abort().
Inside `guarded_aborts` the assertion is thrown as a C++ exception, which llama.cpp's loader catches as
it catches any other error of a file. Outside, nothing changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

from lowtide.attention.native_library import native_library
from lowtide.models.llama_library import llama_library


@contextlib.contextmanager
def guarded_aborts() -> Iterator[None]:
    """Guard the block on this thread."""
    _install()
    library = native_library()
    library.lowtide_enter_guarded_section()
    try:
        yield
    finally:
        library.lowtide_leave_guarded_section()


@functools.cache
def _install() -> None:
    address = ctypes.cast(native_library().lowtide_on_abort, ctypes.c_void_p).value
    assert address is not None
    llama_library().set_abort_callback(address)

"""The C library's heap, as far as it can be asked to give back what is free. Knows no owner."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Give back the free pages of every arena, where the C library can (glibc); else nothing."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))

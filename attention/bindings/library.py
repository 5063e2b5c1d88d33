"""The native library: loading it, what it was built with, and two guards around llama.cpp's loader."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from lowtide.models.errors import LowtideError
from lowtide.models.gguf.llama_cpp import llama_library

LIBRARY_NAME = "lowtide_native.dll" if sys.platform == "win32" else "lowtide_native.so"
KERNEL_SETS = ("avx512", "avx2", "neon", "portable")
"""Instruction sets of the attention kernels, the fastest first."""


@functools.cache
def native_library() -> ctypes.CDLL:
    """Load the library once. Raises `LowtideError` if the installation lacks it."""
    path = next((p for p in _candidates() if p.is_file()), None)
    if path is None:
        raise LowtideError(
            "lowtide's native library is not installed: reinstall lowtide on a machine with a C++ compiler"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LowtideError(f"lowtide's native library cannot be loaded: {error}") from error
    library.lowtide_cpu_features.restype = ctypes.c_size_t
    library.lowtide_cpu_features.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.lowtide_native_version.restype = ctypes.c_char_p
    library.lowtide_native_version.argtypes = []
    library.lowtide_enter_guarded_section.argtypes = []
    library.lowtide_leave_guarded_section.argtypes = []
    return library


def _candidates() -> list[Path]:
    """Where the library may be: an editable install keeps sources and the built library apart."""
    import lowtide.attention

    return [Path(folder) / LIBRARY_NAME for folder in lowtide.attention.__path__]


def native_version() -> str:
    """Return the version that the library was built with."""
    version: bytes = native_library().lowtide_native_version()
    return version.decode()


def cpu_features() -> tuple[str, ...]:
    """Return the processor's instruction sets that kernels can use, such as "avx2" or "neon"."""
    library = native_library()
    buffer = ctypes.create_string_buffer(library.lowtide_cpu_features(None, 0) + 1)
    library.lowtide_cpu_features(buffer, len(buffer))
    return tuple(buffer.value.decode().split())


def usable_kernel_sets() -> tuple[str, ...]:
    """Return the `KERNEL_SETS` that this build and processor have, the fastest first."""
    library = native_library()
    library.lowtide_has_attention_kernels.argtypes = [ctypes.c_char_p]
    return tuple(
        name for name in KERNEL_SETS if library.lowtide_has_attention_kernels(name.encode())
    )


@contextlib.contextmanager
def guarded_aborts() -> Iterator[None]:
    """Turn failed assertions of llama.cpp on this thread into errors while the block runs.

    A header with absurd numbers makes llama.cpp's assertions fail, and ggml then calls abort(). Inside the
    block the failed assertion is thrown as a C++ exception, which llama.cpp's loader catches.
    """
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


@functools.cache
def can_map_lazily() -> bool:
    """Whether `lazy_mappings` works here."""
    with lazy_mappings() as works:
        return works


@contextlib.contextmanager
def lazy_mappings() -> Iterator[bool]:
    """Map weights without reading them while the block runs on this thread; yields whether that works.

    llama.cpp maps weights with MAP_POPULATE, which reads the whole file at once. Inside the block that flag
    is removed, through the table by which llama.cpp's library calls mmap. 64-bit Linux only; if the table
    has an unknown layout, nothing changes.
    """
    library = native_library()
    enter = library.lowtide_enter_unpopulated_mmap
    enter.argtypes, enter.restype = [ctypes.c_void_p], ctypes.c_int
    works = bool(enter(llama_library().address("llama_model_load_from_file")))
    try:
        yield works
    finally:
        if works:
            library.lowtide_leave_unpopulated_mmap()

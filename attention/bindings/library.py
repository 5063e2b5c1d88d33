"""The C++ core, loaded with ctypes, and two of its guards around llama.cpp's loader.

`guarded_aborts`: a header with absurd numbers makes llama.cpp's assertions fail, and ggml then calls
abort(). Inside the guard the failed assertion is thrown as a C++ exception, which llama.cpp's loader
catches.

`lazy_mappings`: llama.cpp maps weights with MAP_POPULATE, which reads the whole file at once. Inside
this context manager the flag is removed, through the table by which llama.cpp's library calls mmap
(`native/lazy_mappings.cpp`). 64-bit Linux only; where the table looks different, nothing changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

from lowtide.models.errors import LowtideError
from lowtide.models.gguf.llama_cpp import llama_library

LIBRARY_NAME = "lowtide_native.so"


@functools.cache
def native_library() -> ctypes.CDLL:
    """Load the library once. Raises `LowtideError` where the installation lacks it."""
    path = next((p for p in _candidates() if p.is_file()), None)
    if path is None:
        raise LowtideError(
            "lowtide's native library is not installed: reinstall lowtide with a C++ compiler present"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LowtideError(f"lowtide's native library does not load: {error}") from error
    library.lowtide_cpu_features.restype = ctypes.c_size_t
    library.lowtide_cpu_features.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.lowtide_native_version.restype = ctypes.c_char_p
    library.lowtide_native_version.argtypes = []
    library.lowtide_enter_guarded_section.argtypes = []
    library.lowtide_leave_guarded_section.argtypes = []
    return library


def _candidates() -> list[Path]:
    """In an editable install the sources and the built library lie in different folders."""
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


@functools.cache
def can_map_lazily() -> bool:
    """Whether llama.cpp's maps can be left unfilled here."""
    with lazy_mappings() as works:
        return works


@contextlib.contextmanager
def lazy_mappings() -> Iterator[bool]:
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

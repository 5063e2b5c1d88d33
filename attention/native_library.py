"""The C++ core, loaded with ctypes. Knows no kernel by name: callers declare what they call."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from lowtide.models.errors import LowtideError

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

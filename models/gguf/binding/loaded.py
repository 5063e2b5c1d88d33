"""LoadedLibrary: llama.cpp's library in this process, with its plug-ins."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

from lowtide.models.errors import ModelError
from lowtide.models.gguf.binding.declarations import VERSION
from lowtide.models.gguf.binding.find import LibraryFile
from lowtide.models.gguf.binding.openmp import short_spins

_void = ctypes.c_void_p
_IN_PROCESSOR_CODE = "ggml_get_type_traits_cpu"
"""A function of the code for processors, which is in a plug-in where it is not linked."""
_PROCESSOR_CODE = (
    "ggml_backend_cpu_reg",
    "ggml_backend_cpu_init",
    _IN_PROCESSOR_CODE,
    "ggml_threadpool_new",
    "ggml_compute_forward_add",
    "ggml_compute_forward_flash_attn_ext",
    "ggml_compute_forward_soft_max",
    "ggml_gemm_q4_0_8x8_q8_0",
    "ggml_vec_dot_f32",
    "ggml_vec_dot_iq4_xs_q8_K",
    "ggml_vec_dot_iq4_xs_q8_K_generic",
    "ggml_vec_dot_q4_1_q8_1",
    "llamafile_sgemm",
)
"""Functions from each source file of ggml's code for processors, which a linker puts side by side."""
_IN_CPU_PLUGIN = b"ggml_backend_set_n_threads"
"""A function that ggml's processor plug-in gives by its name."""


class LoadedLibrary:
    """The library of `file`. Raises `ModelError` where the system cannot load it."""

    def __init__(self, file: LibraryFile) -> None:
        self.file = file
        self._cpu_plugin: Path | None = None
        with short_spins():
            self._libraries = [_open(path, str(file)) for path in (file.path, *_beside(file.path))]

    def address(self, function: str) -> int:
        """Return the address of a C function of llama.cpp or ggml."""
        address = self._find(function)
        if address is None:
            raise ModelError(
                f"{self.file} has no {function}: install the llama.cpp of llama-cpp-python {VERSION}"
            )
        return address

    def _find(self, function: str) -> int | None:
        for library in self._libraries:
            with contextlib.suppress(AttributeError):
                return ctypes.cast(getattr(library, function), _void).value
        return None

    def processor_code(self) -> tuple[int, int | None]:
        """Return where ggml's code for the processor begins and ends; None where it is a library of its own."""
        address = self.address(_IN_PROCESSOR_CODE)
        if _file_of(address) != _file_of(self.address("llama_decode")):
            return address, None
        found = [at for at in map(self._find, _PROCESSOR_CODE) if at is not None]
        return min(found), max(found)

    @property
    def variant(self) -> str | None:
        """Which of several plug-ins for processors runs, such as "zen4"; None where there is one build."""
        if self._cpu_plugin is None:
            return None
        return self._cpu_plugin.name.split(".")[0].split("ggml-cpu-", 1)[-1]

    def load_plugins(self) -> None:
        """Load the plug-ins; of those for processors, ggml takes the fastest that runs here.

        Nothing happens where the code for the processor is linked.
        """
        if self._find(_IN_PROCESSOR_CODE) is not None:
            return
        load = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(
            self.address("ggml_backend_load_all_from_path")
        )
        with short_spins():
            for folder in self.file.plugin_folders:
                load(os.fsencode(folder))
        self._cpu_plugin = self._find_cpu_plugin()
        self._libraries.append(_open(self._cpu_plugin, str(self.file)))

    def _find_cpu_plugin(self) -> Path:
        by_name = ctypes.CFUNCTYPE(_void, ctypes.c_char_p)(self.address("ggml_backend_reg_by_name"))
        in_plugin = ctypes.CFUNCTYPE(_void, _void, ctypes.c_char_p)(
            self.address("ggml_backend_reg_get_proc_address")
        )
        registry = by_name(b"CPU")
        function = in_plugin(registry, _IN_CPU_PLUGIN) if registry else None
        if function is None:
            raise ModelError(
                f"none of the processor plug-ins of {self.file} runs on this processor: "
                "pip install 'lowtide[native]' to compile llama.cpp for it"
            )
        return _file_of(function)


def _beside(path: Path) -> list[Path]:
    """Return the libraries whose functions this system does not find through the one that links them."""
    names = ("ggml.dll", "ggml-base.dll", "ggml-cpu.dll") if sys.platform == "win32" else ()
    return [path.parent / name for name in names if (path.parent / name).is_file()]


def _open(path: Path, name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ModelError(
            f"llama.cpp of {name} does not load ({error}): reinstall it for this machine"
        ) from error


class _Symbol(ctypes.Structure):
    """Dl_info of dladdr()."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", _void),
        ("name", ctypes.c_char_p),
        ("at", _void),
    ]


def _file_of(address: int) -> Path:
    """Return the shared library that holds an address."""
    if sys.platform == "win32":
        return _windows_file_of(address)
    symbol = _Symbol()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = [_void, _void]
    if not dladdr(address, ctypes.byref(symbol)):
        raise ModelError("the system does not say which plug-in of llama.cpp it has loaded")
    return Path(symbol.file.decode())


def _windows_file_of(address: int) -> Path:
    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    module, buffer = _void(), ctypes.create_unicode_buffer(32768)
    by_address, unchanged_count = 4, 2
    kernel32.GetModuleHandleExW(by_address | unchanged_count, _void(address), ctypes.byref(module))
    kernel32.GetModuleFileNameW(module, buffer, len(buffer))
    return Path(buffer.value)

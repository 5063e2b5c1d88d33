"""Where llama.cpp's library is: the first of several places that has one.

1. `LLAMA_CPP_LIB_PATH`: a folder with the library, or the library itself.
2. lowtide-llama: llama.cpp with a plug-in for each kind of processor.
3. llama-cpp-python, compiled on this machine for its processor.
4. xllamacpp, a prebuilt package: one version of it has the llama.cpp that lowtide declares.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowtide.models.errors import ModelError
from lowtide.models.gguf.binding.processor import missing_features

ENVIRONMENT = "LLAMA_CPP_LIB_PATH"
XLLAMACPP_VERSION = "2026.9.11063"
XLLAMACPP_NEEDS = ("AVX2", "FMA3", "F16C")
"""The instruction sets, by numpy's names, that xllamacpp's x86-64 builds use on every processor."""
NAMES = {"win32": ("llama.dll", "libllama.dll"), "darwin": ("libllama.dylib", "libllama.so")}
_OTHER_NAMES = ("libllama.so", "libllama.so.0")
BUILT_FOR = {
    "llama-cpp-python": "the processor that compiled it; it may crash on an older one",
    "xllamacpp": "any processor since 2013: lowtide-llama or 'lowtide[native]' use what newer ones have, which "
    "makes llama.cpp's own kernels faster, not lowtide's",
}
"""For which processors a package's library is built, where it has one build."""
HOW_TO_INSTALL = (
    "pip install 'lowtide[prebuilt]' for a prebuilt one, or 'lowtide[native]' to compile one here"
)


@dataclass(frozen=True, slots=True)
class LibraryFile:
    """A library of llama.cpp; `package` and `version` name what it came with.

    `plugin_folders` may hold plug-ins of ggml: for processors, and for other devices.
    """

    path: Path
    package: str
    version: str
    plugin_folders: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"{self.package} {self.version}".strip()

    def built_for(self, variant: str | None) -> str:
        """Say for which processors the library was built, and what another one would bring.

        `variant` is the plug-in for processors that runs, None where there is one build for all.
        """
        if variant is not None:
            return f"many kinds of processors; this one runs the build for {variant}"
        return BUILT_FOR.get(self.package, "one kind of processor")


def find_library() -> LibraryFile:
    """Return the library to load; raise `ModelError` where there is none that this machine can use."""
    override = os.environ.get(ENVIRONMENT)
    if override is not None:
        return _overridden(Path(override))
    for found in _installed():
        if found is not None:
            return found
    raise ModelError(
        f"GGUF models run with llama.cpp, and no library of it is installed: {HOW_TO_INSTALL}"
    )


def _installed() -> Iterator[LibraryFile | None]:
    """Yield each package's library, or None where the package or its library is missing."""
    yield _in_folder("lowtide-llama", _package_folder("lowtide_llama"))
    yield _in_folder("llama-cpp-python", _package_folder("llama_cpp"))
    yield _xllamacpp()


def _overridden(path: Path) -> LibraryFile:
    file = path if path.is_file() else _library_in(path)
    if file is None:
        raise ModelError(
            f"{ENVIRONMENT} is {path}, but there is no {library_names()[0]}: set it to llama.cpp's folder"
        )
    return LibraryFile(file.resolve(), f"{ENVIRONMENT}={path}", "", (file.parent,))


def _in_folder(package: str, folder: Path | None) -> LibraryFile | None:
    file = None if folder is None else _library_in(folder / "lib")
    if folder is None or file is None:
        return None
    return LibraryFile(file, package, _version(package, folder), (file.parent,))


def _xllamacpp() -> LibraryFile | None:
    folder = _package_folder("xllamacpp")
    if folder is None:
        return None
    file = next((f for pattern in ("*.so", "*.pyd") for f in sorted(folder.glob(pattern))), None)
    if file is None:
        return None
    version = _version("xllamacpp", folder)
    if version != XLLAMACPP_VERSION:
        raise ModelError(
            f"xllamacpp {version} has another llama.cpp than lowtide calls: "
            f"pip install xllamacpp=={XLLAMACPP_VERSION}"
        )
    missing = missing_features(XLLAMACPP_NEEDS)
    if missing:
        raise ModelError(
            f"the llama.cpp in xllamacpp needs a processor with {', '.join(missing)}, which this one lacks: "
            "install lowtide-llama, or pip install 'lowtide[native]' to compile it for this machine"
        )
    return LibraryFile(file, "xllamacpp", version)


def library_names() -> tuple[str, ...]:
    """Return the names that llama.cpp's library may have on this system."""
    return NAMES.get(sys.platform, _OTHER_NAMES)


def _library_in(folder: Path) -> Path | None:
    return next((folder / n for n in library_names() if (folder / n).is_file()), None)


def _package_folder(name: str) -> Path | None:
    """Return the folder of a package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _version(package: str, folder: Path) -> str:
    """Return the version by the name of the metadata's folder; importlib.metadata would cost 3 MiB."""
    prefix = package.replace("-", "_") + "-"
    found = next(folder.parent.glob(f"{prefix}*.dist-info"), None)
    return "" if found is None else found.name[len(prefix) : -len(".dist-info")]

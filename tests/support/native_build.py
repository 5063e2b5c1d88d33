"""Compile the C++ core for tests: programs, kernels of other processors, and a library of entry points.

The sources and their flags are those of `attention/native/sources.txt`, as in the wheel.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "attention" / "native"
NATIVE = ROOT / "attention" / "native"
PROGRAMS = sorted(path.name.removesuffix("_test.cpp") for path in TESTS.glob("*_test.cpp"))
"""Test programs: none of them needs llama.cpp or onnxruntime."""
LIBRARIES = {"mmap_hook": "mapping_library"}
"""A shared library that a test program is linked with."""
TEST_LIBRARY_FLAGS = ("-O3", "-fPIC", "-fvisibility=hidden")


def read_sources(processor: str) -> dict[str, list[str]]:
    """Return each source of sources.txt with the flags of its own that `processor` has."""
    sources = {}
    for line in (NATIVE / "sources.txt").read_text().splitlines():
        words = line.split()
        if words and not words[0].startswith("#"):
            source, *flags = words
            sources[source] = flags[1:] if flags and flags[0] == processor else []
    return sources


SOURCES: Mapping[str, list[str]] = read_sources("x86_64") if NATIVE.is_dir() else {}
KERNELS = [source for source, flags in SOURCES.items() if flags]
"""The sources of the x86-64 instruction sets."""


class NativeBuild:
    """A folder of objects that are compiled with the same flags, each source once."""

    def __init__(
        self,
        compiler: str,
        folder: Path,
        flags: Sequence[str],
        processor: str = platform.machine(),
    ) -> None:
        self._folder = folder
        self._sources = read_sources(processor)
        version = '-DLOWTIDE_VERSION="test"'
        self._common = [compiler, "-std=c++17", f"-I{NATIVE}", version, *flags]

    def program(self, name: str) -> Path:
        """Build the test program `name` and return its path."""
        archive = self._folder / "native.a"
        if not archive.exists():
            subprocess.run(["ar", "rcs", archive, *self.objects()], check=True)
        more = [str(archive)]
        if name in LIBRARIES:
            more.append(self._linked(LIBRARIES[name], "-fPIC", "-shared"))
        return Path(self._linked(f"{name}_test", *more, "-pthread", "-ldl"))

    def library(self, name: str, *tests: str) -> Path:
        """Build a shared library of the C++ core and of some sources in `TESTS`."""
        path = self._folder / name
        sources = [str(TESTS / test) for test in tests]
        objects = map(str, self.objects())
        self._run(*sources, *objects, "-shared", "-pthread", "-ldl", "-o", str(path))
        return path

    def objects(self) -> list[Path]:
        """Compile every source, as many at a time as there are cores, and return the objects."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.object, self._sources))

    def object(self, source: str) -> Path:
        """Return the object of `source`, a path in sources.txt; it is compiled the first time."""
        path = self._folder / f"{source.replace('/', '_')}.o"
        if not path.exists():
            self._run(*self._sources[source], "-c", str(NATIVE / source), "-o", str(path))
        return path

    def _linked(self, test: str, *more: str) -> str:
        path = str(self._folder / test)
        self._run(str(TESTS / f"{test}.cpp"), *more, "-o", path)
        return path

    def _run(self, *arguments: str) -> None:
        subprocess.run([*self._common, *arguments], check=True)


@functools.cache
def test_library() -> Path:
    """Build `lowtide_native_test`, the C++ core with the entry points of kernel_calls.h; return its path.

    It stays in build/ until a source or the compiler changes. Skips the test where the sources (in the
    tests of the wheel) or a compiler are missing.
    """
    if not NATIVE.is_dir():
        pytest.skip("the C++ sources are not here: this runs against the wheel")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    builds = ROOT / "build" / "native-tests"
    folder = builds / _content_hash(compiler)
    library = folder / "lowtide_native_test.so"
    if not library.exists():
        shutil.rmtree(builds, ignore_errors=True)
        folder.mkdir(parents=True)
        build = NativeBuild(compiler, folder, TEST_LIBRARY_FLAGS)
        build.library("unfinished.so", "kernel_calls.cpp").rename(library)
    return library


test_library.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


def _content_hash(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    content = hashlib.sha256(version + " ".join(TEST_LIBRARY_FLAGS).encode())
    for folder in (NATIVE, TESTS):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()[:16]

"""Compile the C++ core for tests: programs, kernels of other processors, and a library of entry points.

The sources and their flags are those of `attention/native/sources.txt`, as in the wheel.
"""

from __future__ import annotations

import fcntl
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
BUILDS = ROOT / "build" / "tests"
PROGRAMS = sorted(path.name.removesuffix("_test.cpp") for path in TESTS.glob("*_test.cpp"))
"""Test programs: none of them needs llama.cpp or onnxruntime."""
LIBRARIES = {"mmap_hook": "mapping_library"}
"""A shared library that a test program is linked with."""
TEST_LIBRARY_FLAGS = ("-O3", "-fPIC", "-fvisibility=hidden")


def read_sources(processor: str, compiler: str = "gcc") -> dict[str, list[str]]:
    """Return each source of sources.txt with the flags of its own for `processor`; `compiler` is gcc or clang."""
    sources = {}
    for line in (NATIVE / "sources.txt").read_text().splitlines():
        words = line.split()
        if words and not words[0].startswith("#"):
            source, *flags = words
            own = flags[1:] if flags and flags[0] == processor else []
            named = [flag.rpartition(":") for flag in own]
            sources[source] = [flag for only, _, flag in named if only in ("", compiler)]
    return sources


SOURCES: Mapping[str, list[str]] = read_sources("x86_64")
KERNELS = [source for source, flags in SOURCES.items() if flags]
"""The sources of the x86-64 instruction sets."""


class NativeBuild:
    """A folder of objects that are compiled with the same flags, each source once."""

    def __init__(
        self,
        compiler: Sequence[str],
        folder: Path,
        flags: Sequence[str],
        processor: str = platform.machine(),
    ) -> None:
        self._folder = folder
        self._sources = read_sources(processor, "clang" if is_clang(compiler) else "gcc")
        version = '-DLOWTIDE_VERSION="test"'
        self._common = [*compiler, "-std=c++17", f"-I{NATIVE}", version, *flags]

    def programs(self, names: Sequence[str]) -> dict[str, Path]:
        """Build test programs, as many at a time as there are cores; return their paths by name."""
        archive = self._folder / "native.a"
        if not archive.exists():
            subprocess.run(["ar", "rcs", archive, *self.objects()], check=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(
                zip(
                    names,
                    pool.map(functools.partial(self._program, archive=archive), names),
                    strict=True,
                )
            )

    def library(self, name: str, *tests: str) -> Path:
        """Build a shared library of the C++ core and of some sources in `TESTS`."""
        sources = [str(TESTS / test) for test in tests]
        return self._made(name, *sources, *map(str, self.objects()), "-shared", "-pthread", "-ldl")

    def objects(self) -> list[Path]:
        """Compile every source, as many at a time as there are cores, and return the objects."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.object, self._sources))

    def object(self, source: str) -> Path:
        """Return the object of `source`, a path in sources.txt."""
        flags = self._sources[source]
        return self._made(f"{source.replace('/', '_')}.o", *flags, "-c", str(NATIVE / source))

    def _program(self, name: str, archive: Path) -> Path:
        more = [str(archive), "-pthread", "-ldl"]
        if name in LIBRARIES:
            source = str(TESTS / f"{LIBRARIES[name]}.cpp")
            more.append(str(self._made(f"{LIBRARIES[name]}.so", source, "-fPIC", "-shared")))
        return self._made(f"{name}_test", str(TESTS / f"{name}_test.cpp"), *more)

    def _made(self, name: str, *arguments: str) -> Path:
        """Return the file `name`, compiled the first time; a compilation that is killed leaves none."""
        path = self._folder / name
        if not path.exists():
            part = path.with_name(f"{name}.part")
            subprocess.run([*self._common, *arguments, "-o", str(part)], check=True)
            part.rename(path)
        return path


def cached_build(name: str, compiler: str, flags: Sequence[str]) -> NativeBuild:
    """Return a build under build/tests that stays until a source, a flag or the compiler changes."""
    folder = BUILDS / f"{name}-{_content_hash(compiler, flags)}"
    if not folder.is_dir():
        for old in BUILDS.glob(f"{name}-*"):
            shutil.rmtree(old)
        folder.mkdir(parents=True)
    return NativeBuild([compiler], folder, flags)


def is_clang(compiler: Sequence[str]) -> bool:
    """Return whether a compiler calls itself Clang; zig's does."""
    return (
        b"clang" in subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    )


@functools.cache
def test_library() -> Path:
    """Build `lowtide_native_test`, the C++ core, kernel_calls.h and failing_op.cpp; return its path.

    Skips the test where there is no compiler.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of pytest-xdist build it at the same time
        build = cached_build("library", compiler, TEST_LIBRARY_FLAGS)
        return build.library("lowtide_native_test.so", "kernel_calls.cpp", "failing_op.cpp")


test_library.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


def _content_hash(compiler: str, flags: Sequence[str]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    content = hashlib.sha256(version + " ".join(flags).encode())
    for folder in (NATIVE, TESTS):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()[:16]

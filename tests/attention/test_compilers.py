"""The C++ core compiles without a warning: every GCC and Clang that is installed, and systems by cross-compiling."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_build import NATIVE, NativeBuild, read_sources

pytestmark = pytest.mark.slow

COMPILERS = [
    *(f"g++-{version}" for version in range(11, 15)),
    *(f"clang++-{version}" for version in range(14, 20)),
]
STRICT = ("-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
ZIG = (sys.executable, "-m", "ziglang", "c++")
"""A Clang with the headers and libraries of many systems. It has none of Android's."""
TARGETS = [
    "x86_64-linux-gnu.2.17",
    "aarch64-linux-gnu.2.17",
    "x86_64-linux-musl",
    "aarch64-linux-musl",
    "x86_64-macos",
    "aarch64-macos",
    "x86_64-windows-gnu",
    "aarch64-windows-gnu",
]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiler_has_no_warning(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    objects = NativeBuild([compiler], tmp_path, [*STRICT, "-fPIC"]).objects()
    assert len(objects) == len(read_sources("x86_64"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_system_is_compiled_for(target: str, tmp_path: Path) -> None:
    pytest.importorskip("ziglang")
    processor, system = target.split("-")[:2]
    build = NativeBuild([*ZIG, "-target", target], tmp_path, [*STRICT, "-fPIC"], processor)
    library = tmp_path / "lowtide_native"
    # No unknown names: macOS and Windows refuse a library that lacks a function, others when they load it.
    strict = ["-Wl,-z,defs"] if system == "linux" else []
    objects = map(str, build.objects())
    link = [*ZIG, "-target", target, *objects, "-shared", "-s", *strict, "-o", str(library)]
    subprocess.run(link, check=True)
    assert exported(library) >= c_functions()


def exported(library: Path) -> set[str]:
    """Return which names of the C interface a stripped library still has: the exported ones."""
    content = library.read_bytes()
    return {name for name in c_functions() if name.encode() + b"\0" in content}


def c_functions() -> set[str]:
    """Return the functions that Python and onnxruntime look up by name."""
    marked = "\n".join(path.read_text() for path in NATIVE.rglob("*.cpp"))
    names = {
        line.split("(")[0].split()[-1].lstrip("*")
        for line in marked.splitlines()
        if line.startswith("LOWTIDE_API")
    }
    assert "RegisterCustomOps" in names and "lowtide_tokenize" in names
    return names

"""Compiles the C++ core with its own test into a program, for sanitizers and other processors."""

from __future__ import annotations

import subprocess
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "attention" / "native"
NATIVE = TESTS.parents[2] / "attention" / "native"
SOURCES = (
    "attend attend_avx2 attend_avx512 attend_bf16 attend_portable cpu_features find_kernels key_set "
    "tidal_attend"
).split()
AVX512 = "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mf16c -Wno-maybe-uninitialized".split()
X86_FLAGS = {
    "attend_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "attend_avx512": AVX512,
    "attend_bf16": [*AVX512, "-mavx512bf16"],
}


def build_test(compiler: str, folder: Path, flags: list[str], *, x86: bool) -> Path:
    """Build `attend_test` in `folder` and return the program's path."""
    common = [compiler, "-std=c++17", f"-I{NATIVE}", '-DLOWTIDE_VERSION="test"', *flags]
    objects = []
    for name in SOURCES:
        objects.append(folder / f"{name}.o")
        own = X86_FLAGS.get(name, []) if x86 else []
        source = str(NATIVE / f"{name}.cpp")
        subprocess.run([*common, *own, "-c", source, "-o", str(objects[-1])], check=True)
    program = folder / "attend_test"
    test = str(TESTS / "attend_test.cpp")
    subprocess.run([*common, test, *map(str, objects), "-pthread", "-o", str(program)], check=True)
    return program

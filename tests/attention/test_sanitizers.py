"""The C++ core under the compiler's sanitizers: bounds, undefined behaviour, races."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "attention" / "native"
SOURCES = "attend attend_avx2 attend_avx512 attend_portable cpu_features find_kernels".split()
FLAGS = {
    "attend_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "attend_avx512": [
        *("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mf16c"),
        "-Wno-maybe-uninitialized",
    ],
}


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_kernels_under_sanitizers(sanitizers: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    if not NATIVE.is_dir():
        pytest.skip("the sources are not here: this runs against the wheel")
    common = [compiler, "-std=c++17", "-O1", "-g", f"-I{NATIVE}", '-DLOWTIDE_VERSION="test"']
    common += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    objects = []
    for name in SOURCES:
        flags = FLAGS.get(name, []) if platform.machine() == "x86_64" else []
        objects.append(tmp_path / f"{name}.o")
        source = str(NATIVE / f"{name}.cpp")
        subprocess.run([*common, *flags, "-c", source, "-o", str(objects[-1])], check=True)
    program = str(tmp_path / "attend_test")
    test = str(HERE / "native" / "attend_test.cpp")
    subprocess.run([*common, test, *map(str, objects), "-pthread", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is beyond the thread sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("problems agree\n")

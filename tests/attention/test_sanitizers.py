"""The C++ core under the compiler's sanitizers: bounds, undefined behaviour, races."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from native_build import NATIVE, build_test


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_kernels_under_sanitizers(sanitizers: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    if not NATIVE.is_dir():
        pytest.skip("the sources are not here: this runs against the wheel")
    flags = ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    program = build_test(compiler, tmp_path, flags, x86=platform.machine() == "x86_64")
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is beyond the thread sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("problems agree\n")

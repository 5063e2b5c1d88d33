"""The NEON kernels: compiled for 64-bit Arm and run under an emulator, where both are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from native_build import NATIVE, NativeBuild

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def test_the_kernels_on_arm(tmp_path: Path) -> None:
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: g++-aarch64-linux-gnu and qemu-user")
    if not NATIVE.is_dir():
        pytest.skip("the sources are not here: this runs against the wheel")
    program = NativeBuild(COMPILER, tmp_path, ["-O2", "-static"], x86=False).program("attend")
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("40 problems agree\n")  # of one kernel set, the NEON one

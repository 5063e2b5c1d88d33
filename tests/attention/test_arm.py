"""The NEON kernels: compiled for 64-bit Arm and run under an emulator, where both are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from native_build import NativeBuild

pytestmark = pytest.mark.slow

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


# Attention has one kernel set on Arm. The matmul has three: plain NEON, with dot-product instructions, and
# with int8 matrix instructions (i8mm).
@pytest.mark.parametrize(
    ("name", "problems"), [("flash", "40 problems"), ("matmul", "90 problems")]
)
def test_the_kernels_on_arm(name: str, problems: str, tmp_path: Path) -> None:
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: g++-aarch64-linux-gnu and qemu-user")
    build = NativeBuild([COMPILER], tmp_path, ["-O2", "-static"], "aarch64")
    program = build.programs([name])[name]
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{problems} agree\n")

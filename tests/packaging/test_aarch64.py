"""The wheel on 64-bit Arm, under qemu-user: it is built, installed and finds its kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import emulated
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> list[str]:
    emulated.require("apt-get", "dpkg", "qemu-aarch64", "aarch64-linux-gnu-g++")
    folder = emulated.BUILD / "aarch64"
    script = emulated.ROOT / "packaging" / "aarch64.sh"
    subprocess.run([script, folder], check=True, env=os.environ | {"PYTHON": sys.executable})
    return [str(folder / "python")]


def test_doctor_finds_nothing_wrong(python: list[str]) -> None:
    done = emulated.run(python, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No problems found" in done.stdout and "with the neon kernels" in done.stdout

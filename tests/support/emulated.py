"""Run lowtide's wheel on other processors: under qemu-user, with packages of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
COMMAND = "from lowtide.cli.main import run; run()"
SECONDS = 1200


def require(*tools: str) -> None:
    """Skip the test where a program is not installed."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def made_site() -> Path:
    """Install the wheel of this machine's kind of processor with a prebuilt llama.cpp; return the folder."""
    folder = BUILD / "portable"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "-w", folder / "wheels", "."], cwd=ROOT, check=True
    )
    (wheel,) = (folder / "wheels").glob("lowtide-*.whl")
    subprocess.run(
        [*pip, "install", "--quiet", "--target", folder / "site", f"{wheel}[prebuilt]"], check=True
    )
    return folder / "site"


def run(
    python: Sequence[str], *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the `lowtide` command with a Python, as a user does."""
    # The tests' own choice of a BLAS kernel may be one that the emulated processor lacks.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS")}
    kept |= variables
    return subprocess.run(
        [*python, "-c", COMMAND, *arguments],
        env=kept,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def greedy_tokens(python: Sequence[str], *arguments: str, **variables: str) -> list[int]:
    """Return the first three tokens of an answer of the default model at temperature 0.

    One thread, because spinning threads of an emulator wait for each other. No tight budget: the emulator's own
    memory counts as the process's.
    """
    answer = ("-p", "Hello", "-n", "3", "--temp", "0", "--json", "-t", "1", "-c", "256")
    done = run(python, "run", *answer, "--memory", "2GiB", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    tokens: list[int] = result["tokens"]
    assert len(tokens) == 3
    return tokens

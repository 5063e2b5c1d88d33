"""The time of a command from its start to its end, with what earlier runs stored of the model and without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.benchmark

PROGRAM = "from lowtide.cli.main import run; run()"
RUN = ("run", "-p", "hi", "-n", "1", "--memory", "2GiB")
COMMANDS = {
    "help": ("--help",),
    "version": ("--version",),
    "plan": ("plan", "--memory", "2GiB"),
    "plan of gemma3-270m": ("plan", "gemma3-270m", "--memory", "2GiB"),
    "run": RUN,
    "run with llama.cpp's kernels": (*RUN, "--reference"),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of a user: Python stores its bytecode, as an installation does."""
    found = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    found["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("bytecode"))
    found["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return found


@pytest.mark.parametrize("is_stored", [True, False], ids=["stored", "first"])
@pytest.mark.parametrize("name", COMMANDS)
def test_from_start_to_end(
    benchmark: Any, environment: dict[str, str], name: str, is_stored: bool
) -> None:
    facts = Path(environment["XDG_CACHE_HOME"]) / "lowtide" / "facts"

    def forget() -> None:
        if not is_stored:
            shutil.rmtree(facts, ignore_errors=True)

    def command() -> None:
        subprocess.run(
            [sys.executable, "-c", PROGRAM, *COMMANDS[name]],
            env=environment,
            check=True,
            capture_output=True,
        )

    benchmark.pedantic(command, setup=forget, rounds=9, warmup_rounds=3)
    uses_a_model = COMMANDS[name][0] in ("plan", "run")
    assert facts.is_dir() or not uses_a_model, "nothing was stored"

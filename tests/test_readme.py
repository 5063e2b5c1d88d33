"""Whatever the README shows is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from processes import run_lowtide, run_python

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if "lowtide " in line]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line: str) -> None:
    before, _, command = line.partition("lowtide ")
    stdin = b""
    if "|" in before:
        stdin = shlex.split(before)[1].encode() + b"\n"
    done = run_lowtide(*shlex.split(command, comments=True), stdin=stdin)
    assert done.code == 0, done.stderr
    assert done.stdout


def test_make_targets_exist() -> None:
    makefile = ROOT / "Makefile"
    if not makefile.exists():
        pytest.skip("the Makefile is not here: this runs against the wheel")
    named = set(re.findall(r"\bmake (\w[\w-]*)\b", README)) & {"chat", "test", "bench", "check"}
    assert {"chat", "test", "bench"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile.read_text(), re.MULTILINE)


def test_python_examples() -> None:
    example, refusal = (run_python(code) for code in blocks("python"))
    assert example.code == 0, example.stderr
    assert "planned peak" in example.stdout
    assert "needs at least 85 MiB, 40.0 MiB allowed: raise --memory to 85MiB" in refusal.stdout


def test_there_are_examples() -> None:
    assert len(COMMANDS) >= 6 and len(blocks("python")) == 2

"""Every program in examples/ runs, is short and says how to run it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from processes import run_measured

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))
STDIN = {"chat": b"My name is Ada.\nWhat is my name?\n"}
ARGUMENTS = {"profile_embedding": ["trace.json"]}
EXPECTED = {
    "batch": "same tokens: True; guaranteed: True",
    "chat": "prompt tokens, ",
    "own_constraint": "has no e: True",
    "own_policy": "% of the cached keys",
    "plan": "planned peak",
    "profile_embedding": "find notes",
    "submit": "tokens, ",
    "tools": "calls tide {",
}


@pytest.mark.real
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ARGUMENTS.get(path.stem, [])
    done = run_measured(sys.executable, str(path), *arguments, stdin=STDIN.get(path.stem, b""))
    assert done.code == 0, done.stderr
    assert EXPECTED[path.stem] in done.stdout
    assert all((tmp_path / name).exists() for name in arguments)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"Run it: python examples/{path.name}" in (ast.get_docstring(ast.parse(text)) or "")

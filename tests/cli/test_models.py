"""`lowtide models` shows and deletes repacked copies; a bar shows a slow one on a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from gguf_files import write_model

from lowtide.cli.common import progress
from lowtide.cli.main import main


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_model(tmp_path / "model.gguf", quantised="Q4_0")


def _lowtide(*arguments: str) -> str:
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_copies_are_listed_and_deleted(model: Path) -> None:
    assert "Repacked copies" not in _lowtide("models")
    path = _lowtide("models", "repack", str(model)).strip()
    listed = _lowtide("models")
    assert str(model) in listed and "gone" not in listed
    (copy,) = json.loads(_lowtide("models", "--json"))["repacked_copies"]
    assert copy == {
        "models": [str(model)],
        "needed": True,
        "bytes": Path(path).stat().st_size,
        "files": [path],
    }
    assert "nothing to delete" in _lowtide("models", "clean")
    assert "Deleted" in _lowtide("models", "clean", str(model))
    assert not Path(path).exists()
    assert "nothing to delete" in _lowtide("models", "clean", str(model))


def test_clean_deletes_copies_without_a_model_or_all(model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.gguf", quantised="Q4_0", context=512)
    for path in (model, other):
        _lowtide("models", "repack", str(path))
    model.unlink()
    assert "(which is gone or has changed)" in _lowtide("models")
    assert "Deleted" in _lowtide("models", "clean")
    (copy,) = json.loads(_lowtide("models", "--json"))["repacked_copies"]
    assert copy["models"] == [str(other)]
    assert "Deleted" in _lowtide("models", "clean", "--all")
    assert json.loads(_lowtide("models", "--json"))["repacked_copies"] == []


def test_one_model_and_all_exclude_each_other(model: Path) -> None:
    done = CliRunner().invoke(main, ["models", "clean", str(model), "--all"])
    assert done.exit_code == 2 and "leave one out" in done.stderr


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stderr", "seconds", "shown"), [
    (_Terminal(), 1.5, True),
    (_Terminal(), 0.4, False),
    (io.StringIO(), 1.5, False),
], ids=["slow", "fast", "no terminal"])  # fmt: skip
def test_the_bar_is_shown_where_it_helps(
    monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, seconds: float, shown: bool
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.sys, "stderr", stderr)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.RepackingBar("Repacking model", 100)
    for _ in range(10):
        bar.advance(10)
        now[0] += seconds / 9
    bar.close()
    assert ("Repacking model" in stderr.getvalue()) == shown
    assert ("100%" in stderr.getvalue()) == shown

"""Facts hold until a file changes, and never where that cannot be told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowtide.models.facts import store
from lowtide.models.facts.store import Facts

VALUE = {"layers": [1, 2, 3], "name": "ein Modell", "none": None}


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were just written count as settled."""
    monkeypatch.setattr(store, "SETTLED_S", -3600.0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


def _stored(model: Path) -> Facts:
    facts = Facts.about("test", model)
    facts.write(VALUE, [model])
    assert Facts.about("test", model).read() == VALUE
    return facts


def test_what_is_stored_is_read_again(settled: None, model: Path) -> None:
    _stored(model)
    assert Facts.about("test", model.with_name("other")).read() is None
    assert Facts.about("other", model).read() is None
    assert Facts.about("test", model, "another library").read() is None


def test_a_relative_path_counts_from_the_working_directory(
    settled: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stored(model)
    monkeypatch.chdir(model.parent)
    assert Facts.about("test", Path(model.name)).read() == VALUE
    (model.parent / "sub").mkdir()
    monkeypatch.chdir(model.parent / "sub")
    assert Facts.about("test", Path(model.name)).read() is None


def _same_size_and_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"weights")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "longer": lambda path: path.write_bytes(b"more weights"),
    "touched": lambda path: path.touch(),
    "the same size and time": _same_size_and_time,
    "replaced by one like it": _replaced,
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_changed_file_has_no_facts(
    settled: None, model: Path, change: Callable[[Path], object]
) -> None:
    facts = _stored(model)
    time.sleep(0.02)  # a clock tick of the file system
    change(model)
    assert facts.read() is None


def test_every_file_counts_and_so_does_a_link(settled: None, model: Path) -> None:
    library = model.with_name("library")
    library.write_bytes(b"code")
    link = model.with_name("link")
    link.symlink_to(model)
    facts = Facts.about("test", link)
    facts.write(VALUE, [link, library])
    assert facts.read() == VALUE
    link.unlink()
    link.symlink_to(library)
    assert facts.read() is None
    facts.write(VALUE, [model, library])
    assert facts.read() == VALUE
    library.unlink()
    assert facts.read() is None


def test_nothing_is_stored_of_a_file_that_just_changed(model: Path) -> None:
    facts = Facts.about("test", model)
    facts.write(VALUE, [model])
    assert facts.read() is None
    assert facts.path is not None and not facts.path.exists()


def test_nothing_is_stored_without_a_file_to_watch_or_of_one_that_is_gone(
    settled: None, model: Path
) -> None:
    facts = Facts.about("test", model)
    facts.write(VALUE, [])
    facts.write(VALUE, [model, model.with_name("missing")])
    assert facts.read() is None


def test_a_torn_file_is_ignored(settled: None, model: Path) -> None:
    facts = _stored(model)
    assert facts.path is not None
    whole = facts.path.read_bytes()
    for length in range(len(whole)):
        facts.path.write_bytes(whole[:length])
        assert facts.read() is None, length
        facts.path.write_bytes(whole[:length].ljust(len(whole), b"\0"))
        assert facts.read() is None, length
    for i in range(len(whole)):
        facts.path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        assert facts.read() is None, i
    facts.path.write_bytes(whole)
    assert facts.read() == VALUE


def test_the_file_of_another_user_is_ignored(
    settled: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = _stored(model)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert facts.read() is None


def test_no_cache_folder_is_fine(
    settled: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "facts_folder", lambda: None)
    facts = Facts.about("test", model)
    facts.write(VALUE, [model])
    assert facts.read() is None


def test_a_folder_that_cannot_be_made_is_fine(
    settled: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "facts_folder", lambda: model / "facts")
    facts = Facts.about("test", model)
    facts.write(VALUE, [model])
    assert facts.read() is None


def test_the_folder_is_bounded(settled: None, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_FILES", 5)
    monkeypatch.setattr(store, "MAX_FOLDER_BYTES", 4000)
    for i in range(20):
        Facts.about("test", model, str(i)).write("x" * 1000, [model])
        folder = store.facts_folder()
        assert folder is not None
        files = list(folder.iterdir())
        assert len(files) <= 5
        assert sum(file.stat().st_size for file in files) <= 4000
        assert Facts.about("test", model, str(i)).read() == "x" * 1000


def test_a_large_value_is_not_stored(settled: None, model: Path) -> None:
    facts = Facts.about("test", model)
    facts.write("x" * store.MAX_FILE_BYTES, [model])
    assert facts.read() is None

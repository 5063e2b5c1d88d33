"""A stored spec equals the one that is read, and is read again when a file changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.models.errors import BadModelFile, ModelNotFound
from lowtide.models.facts import store
from lowtide.models.gguf.header import spec as gguf_spec
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.spec import ModelSpec


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SETTLED_S", -3600.0)


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose header was read, in order."""
    read: list[Path] = []
    read_gguf = gguf_spec.read_gguf

    def counted(path: Path) -> object:
        read.append(path)
        return read_gguf(path)

    monkeypatch.setattr(gguf_spec, "read_gguf", counted)
    return read


def _models(folder: Path) -> list[Path]:
    return [
        write_model(folder / "plain.gguf"),
        write_model(
            folder / "quantised.gguf", quantised="Q4_0", chat_template="{{ messages }}\u20ac"
        ),
        write_model(folder / "window.gguf", overrides={"attention.sliding_window": 64}),
        write_model(
            folder / "gemma.gguf", architecture="gemma3", overrides={"attention.sliding_window": 64}
        ),
    ]


def test_the_stored_spec_is_the_one_that_is_read(tmp_path: Path, headers_read: list[Path]) -> None:
    for path in _models(tmp_path):
        first = read_spec(path)
        assert headers_read.count(path) == 1
        assert read_spec(path) == first
        assert headers_read.count(path) == 1


def test_the_default_model_is_read_once(smollm2_spec: ModelSpec, headers_read: list[Path]) -> None:
    for _ in range(3):
        assert read_spec(smollm2_spec.path) == smollm2_spec
    assert len(headers_read) == 1


def test_the_path_is_the_one_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers_read: list[Path]
) -> None:
    path = write_model(tmp_path / "model.gguf")
    read_spec(path)
    monkeypatch.chdir(tmp_path)
    assert read_spec(Path("model.gguf")).path == Path("model.gguf")
    assert len(headers_read) == 1


def test_a_changed_model_is_read_again(tmp_path: Path, headers_read: list[Path]) -> None:
    path = write_model(tmp_path / "model.gguf")
    assert read_spec(path).num_layers == 2
    write_model(path, layers=3)
    assert read_spec(path).num_layers == 3
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadModelFile):
        read_spec(path)
    path.unlink()
    with pytest.raises(ModelNotFound):
        read_spec(path)
    assert len(headers_read) == 4


def test_a_copy_is_a_model_of_its_own(tmp_path: Path, headers_read: list[Path]) -> None:
    path = write_model(tmp_path / "model.gguf")
    first = read_spec(path)
    copy = tmp_path / "copy.gguf"
    shutil.copy2(path, copy)
    assert read_spec(copy).path == copy
    assert read_spec(copy).fingerprint == first.fingerprint
    assert headers_read == [path, copy]


def test_values_that_are_no_spec_are_ignored(tmp_path: Path, headers_read: list[Path]) -> None:
    path = write_model(tmp_path / "model.gguf")
    first = read_spec(path)
    facts = store.Facts.about("header", path)
    for values in ([], {}, {"paths": ["model.gguf"]}, {**facts.read(), "new_field": 1}):
        facts.write(values, [path])
        assert read_spec(path) == first
    assert len(headers_read) == 5

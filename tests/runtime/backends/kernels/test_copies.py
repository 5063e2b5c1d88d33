"""Repacked copies: made where there is room, whole or not at all, shown with their models, and collected."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from gguf_files import write_model

from lowtide.models.facts import store
from lowtide.models.gguf.header.spec import read_spec
from lowtide.runtime.backends.kernels import copies, repack
from lowtide.runtime.backends.kernels.copies import collect_copies, delete_copies, read_copies
from lowtide.runtime.backends.kernels.repack import repacked_gguf
from lowtide.runtime.errors import CannotRepack

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/lowtide/repacked"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", quantised="Q4_0")


def test_a_copy_is_shown_with_its_model(model: Path, cache: Path) -> None:
    assert read_copies() == []
    repacked = repacked_gguf(read_spec(model))
    (copy,) = read_copies()
    assert copy.files == repacked.paths and copy.models == ((model,),) and copy.is_needed
    assert copy.num_bytes == repacked.path.stat().st_size
    assert delete_copies([copy]) == copy.num_bytes
    assert list(cache.iterdir()) == []


def test_a_moved_model_keeps_its_copy(model: Path) -> None:
    repacked_gguf(read_spec(model))
    elsewhere = model.with_name("elsewhere.gguf")
    model.rename(elsewhere)
    repacked_gguf(read_spec(elsewhere))
    (copy,) = read_copies()
    assert copy.models == ((elsewhere,),)
    assert collect_copies() == 0


def test_the_copy_of_a_model_that_is_gone_or_changed_is_collected(
    model: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other.gguf", quantised="Q4_0", context=512)
    for path in (model, other):
        repacked_gguf(read_spec(path))
    assert len(read_copies()) == 2
    model.unlink()
    assert [copy.is_needed for copy in read_copies() if copy.models == ((model,),)] == [False]
    write_model(other, quantised="Q4_0", layers=3)
    repacked = repacked_gguf(read_spec(other))  # making a copy collects the others
    (copy,) = read_copies()
    assert copy.files == repacked.paths


def test_a_copy_whose_model_is_not_known_stays(model: Path, cache: Path) -> None:
    repacked_gguf(read_spec(model))
    (sources,) = cache.glob(f"*{copies.SOURCES}")
    for text in ("", "no json", "[1]\n", "\xff"):
        sources.write_text(text, encoding="latin-1")
        (copy,) = read_copies()
        assert copy.models == () and copy.is_needed and collect_copies() == 0


def test_a_disk_without_room_gets_no_copy(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = model.stat().st_size
    free = 2 * num_bytes - 1
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda _path: Usage(1 << 40, 0, free))
    with pytest.raises(CannotRepack, match="make room"):
        repacked_gguf(read_spec(model))
    assert list(cache.iterdir()) == []
    free += 1
    assert repacked_gguf(read_spec(model)).repacked_tensors
    free = 0
    assert repacked_gguf(read_spec(model)).repacked_tensors, "a copy that is there needs no room"


PROGRAM = """
import resource, signal, sys
from pathlib import Path
from lowtide.models.errors import LowtideError
from lowtide.models.gguf.header.spec import read_spec
from lowtide.runtime.backends.kernels.repack import repacked_gguf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    repacked_gguf(read_spec(Path(sys.argv[1])))
except LowtideError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of files' sizes")
def test_a_write_that_the_system_refuses_leaves_nothing(model: Path, cache: Path) -> None:
    limit = str(model.stat().st_size // 2)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), limit], capture_output=True, text=True
    )
    assert "cannot be written" in done.stdout, done.stderr
    assert list(cache.iterdir()) == []


SLOW = """
import sys, time
from pathlib import Path
from lowtide.models.gguf.header.spec import read_spec
from lowtide.runtime.backends.kernels.repack import repacked_gguf
def slowly(num_bytes):
    print("writing", flush=True)
    time.sleep(60)
repacked_gguf(read_spec(Path(sys.argv[1])), slowly)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals and locks of Unix")
def test_the_unfinished_copy_of_a_killed_process_is_collected(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "LEFT_BEHIND_S", -1.0)
    writing = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(model)], stdout=subprocess.PIPE, text=True
    )
    assert writing.stdout is not None
    writing.stdout.readline()
    (unfinished,) = cache.iterdir()
    assert read_copies() == []
    assert collect_copies() == 0 and unfinished.exists(), "another process writes it"
    assert repacked_gguf(read_spec(model)).repacked_tensors
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    writing.stdout.close()
    assert unfinished.exists()
    collect_copies()
    assert not unfinished.exists()
    assert len(read_copies()) == 1


def test_a_folder_that_cannot_be_written_gets_no_copy(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = f"{cache} cannot be written (Read-only file system): set XDG_CACHE_HOME"
    monkeypatch.setattr(copies, "unusable", lambda _folder, _variable: reason)
    with pytest.raises(CannotRepack, match="Read-only file system"):
        repacked_gguf(read_spec(model))
    assert collect_copies() == 0


def test_a_valid_copy_is_checked_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SETTLED_S", -3600.0)
    spec = read_spec(model)
    first = repacked_gguf(spec)
    checked: list[Path] = []
    is_valid_copy = repack._is_valid_copy

    def counted(path: Path, fingerprint: str) -> bool:
        checked.append(path)
        return is_valid_copy(path, fingerprint)

    monkeypatch.setattr(repack, "_is_valid_copy", counted)
    assert repacked_gguf(spec) == repacked_gguf(spec) == first
    assert len(checked) == 1
    time.sleep(0.02)
    with first.path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    before = first.path.read_bytes()
    assert repacked_gguf(spec) == first
    assert len(checked) == 2 and first.path.read_bytes() != before, "a damaged copy is made again"

"""Chat files: any content survives, any damage is refused, and a failure loses no older file."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run_python

from lowtide.models.errors import SnapshotError
from lowtide.runtime.errors import TranscriptError
from lowtide.runtime.sessions import file as module
from lowtide.runtime.sessions.file import open_chat, write_chat

SNAPSHOT = random.Random(1).randbytes(3000)
HEADER = {"messages": [{"role": "user", "content": "Hi 😀\n"}], "num_tokens": 3}
FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(path: Path, snapshot: bytes = SNAPSHOT, header: dict[str, Any] = HEADER) -> int:
    return write_chat(path, lambda at: at.write_bytes(snapshot), header)


def read(path: Path) -> tuple[bytes, dict[str, Any]]:
    with open_chat(path) as file:
        assert file is not None
        return file.snapshot_path.read_bytes()[: file.num_snapshot_bytes], file.header()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert write(tmp_path / "talk") == (tmp_path / "talk").stat().st_size
    assert read(tmp_path / "talk") == (SNAPSHOT, {**HEADER, "version": 2})
    assert os.listdir(tmp_path) == ["talk"]


@FIXTURE
@given(st.binary(max_size=100), st.dictionaries(st.text(), st.text()))
def test_any_snapshot_and_any_text_survive(
    tmp_path: Path, snapshot: bytes, header: dict[str, str]
) -> None:
    write(tmp_path / "talk", snapshot, header)
    assert read(tmp_path / "talk") == (snapshot, {**header, "version": 2})


def test_a_snapshot_of_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SESSION_CHUNK_BYTES", 7)
    write(tmp_path / "talk")
    assert read(tmp_path / "talk")[0] == SNAPSHOT


@FIXTURE
@given(st.data())
def test_any_damaged_byte_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "talk"
    write(path, SNAPSHOT[:200])
    damaged = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        with open_chat(path) as file:
            assert file is None  # the magic is what was hit: it is not a chat file any more
            assert 0 <= at - (len(damaged) - module.FOOTER_BYTES) < len(module.MAGIC)
    except TranscriptError as error:
        assert "damaged" in str(error)


@FIXTURE
@given(st.integers(0, 10_000), st.binary(max_size=100))
def test_a_shorter_or_longer_file_is_refused(tmp_path: Path, length: int, more: bytes) -> None:
    path = tmp_path / "talk"
    write(path, SNAPSHOT[:200])
    whole = path.read_bytes()
    path.write_bytes(other := whole[:length] + more)
    if other == whole:
        assert read(path)[0] == SNAPSHOT[:200]
        return
    try:
        with open_chat(path) as file:
            assert file is None
    except TranscriptError as error:
        assert "damaged" in str(error)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT_VERSION", 1)
    write(tmp_path / "talk")
    monkeypatch.undo()
    with pytest.raises(TranscriptError, match="has format version 1, but only version 2 can be"):
        read(tmp_path / "talk")


def test_paths_that_are_not_regular_files(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(TranscriptError, match="is not a regular file"), open_chat(path):
            pass
        with pytest.raises(TranscriptError, match="exists and is not a file"):
            write(path)
    with pytest.raises(TranscriptError, match="No such file"), open_chat(tmp_path / "none"):
        pass


def test_a_file_that_took_the_name_meanwhile_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    write(path)
    with open_chat(path) as file:
        write(path, b"another")
        assert file is not None
        assert file.snapshot_path.read_bytes().startswith(SNAPSHOT)


def test_a_file_that_was_written_to_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    write(path)
    with open_chat(path) as file:
        assert file is not None
        file.require_unchanged()
        with path.open("ab") as more:
            more.write(b"x")
        with pytest.raises(TranscriptError, match="was changed while it was read"):
            file.require_unchanged()


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _failed(_path: Path) -> int:
    raise SnapshotError("the disk is gone")


def test_a_failure_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk"
    write(path)
    for write_snapshot in (_full, _failed):
        with pytest.raises(TranscriptError, match=r"was not saved \((No space|the disk is gone)"):
            write_chat(path, write_snapshot, {})
    with pytest.raises(TranscriptError, match="ends 1 bytes too early"):
        write_chat(path, lambda at: at.write_bytes(SNAPSHOT) + 1, {})
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(TranscriptError, match="No space left on device"):
        write(path, b"")
    assert read(path)[0] == SNAPSHOT
    assert os.listdir(tmp_path) == ["talk"]


def test_a_snapshot_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    done = run_python(
        "import os\n"
        "from pathlib import Path\n"
        "from lowtide.memory.process import read_process_memory as read\n"
        "from lowtide.runtime.sessions.file import open_chat, write_chat\n"
        "def snapshot(path):\n"
        "    with path.open('wb') as file:\n"
        "        return sum(file.write(os.urandom(1 << 16)) for _ in range(1024))\n"
        f"path = Path({str(tmp_path / 'talk')!r})\n"
        "write_chat(path, lambda at: at.write_bytes(b'warm'), {})\n"
        "before = read().peak_bytes\n"
        "write_chat(path, snapshot, {})\n"
        "with open_chat(path) as file: file.header()\n"
        "print(path.stat().st_size, read().peak_bytes - before)"
    )
    assert done.code == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size > 64 << 20 and grown < 2 << 20

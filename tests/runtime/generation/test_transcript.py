"""Transcripts: any text survives, any damage is refused, and a failure loses no older file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run_python

from lowtide.runtime.errors import TranscriptError
from lowtide.runtime.sessions.file import Transcript

CHAT = Transcript(
    model="m",
    messages=({"role": "user", "content": "Hi 😀"}, {"role": "assistant", "content": "Ho\n"}),
)
FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    CHAT.save(tmp_path / "talk.json")
    assert Transcript.load(tmp_path / "talk.json") == CHAT
    assert os.listdir(tmp_path) == ["talk.json"]


@FIXTURE
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_text_survives(tmp_path: Path, texts: list[str]) -> None:
    chat = Transcript(model="m", messages=tuple({"role": "user", "content": t} for t in texts))
    chat.save(tmp_path / "talk.json")
    assert Transcript.load(tmp_path / "talk.json") == chat


@FIXTURE
@given(st.data())
def test_any_damaged_byte_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "talk.json"
    CHAT.save(path)
    damaged = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        loaded = Transcript.load(path)
    except TranscriptError:
        return
    assert loaded == CHAT  # white space between values has no meaning


BROKEN = {
    "empty": b"",
    "cut": b'{"format": "lowtide-chat", "ver',
    "not text": bytes(range(256)),
    "another format": b'{"format": "other"}',
    "a list": b"[]",
    "deep": b"[" * 100000,
    "another version": b'{"format": "lowtide-chat", "version": 9}',
    "no checksum": b'{"format": "lowtide-chat", "version": 1, "model": "m", "messages": []}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(BROKEN[name])
    with pytest.raises(TranscriptError, match=r"talk\.json") as caught:
        Transcript.load(path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


def test_invalid_messages_are_refused_even_with_a_right_checksum(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    Transcript(model="m", messages=({"role": "user", "content": 5},)).save(path)
    with pytest.raises(TranscriptError, match="has invalid messages"):
        Transcript.load(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(TranscriptError, match="cannot be read"):
        Transcript.load(tmp_path / "none.json")
    with pytest.raises(TranscriptError, match="was not saved"):
        CHAT.save(tmp_path / "no" / "folder.json")


def test_a_full_disk_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk.json"
    CHAT.save(path)

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TranscriptError, match="No space left on device"):
        Transcript(model="n", messages=()).save(path)
    assert Transcript.load(path) == CHAT
    assert os.listdir(tmp_path) == ["talk.json"]


def test_a_write_that_the_system_ends_early_leaves_the_old_file_whole(tmp_path: Path) -> None:
    """A limit on file sizes makes a real write fail half-way, as a disk that fills up does."""
    path = tmp_path / "talk.json"
    CHAT.save(path)
    done = run_python(
        "import resource, signal\n"
        "from pathlib import Path\n"
        "from lowtide.runtime.sessions.file import Transcript\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "long = Transcript(model='m', messages=({'role': 'user', 'content': 'x' * 100000},))\n"
        f"try:\n    long.save(Path({str(path)!r}))\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    assert done.stdout.startswith("TranscriptError") and "was not saved" in done.stdout
    assert Transcript.load(path) == CHAT
    assert os.listdir(tmp_path) == ["talk.json"]

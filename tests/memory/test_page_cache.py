"""How large the pieces are that the page cache holds a file in, and reading it anew."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from lowtide.memory.os import file_mappings as page_cache
from lowtide.memory.os.file_mappings import (
    CHUNK_BYTES,
    TRIED_BYTES,
    has_small_folios,
    reread_file,
    use_large_folios,
)

MIB = 1 << 20
NUM_BYTES = 48 * MIB
tells = pytest.mark.skipif(
    not page_cache._tells_pieces(), reason="this system does not tell how large the pieces are"
)


@pytest.fixture
def written_in_parts(tmp_path: Path) -> Path:
    """A file that is on the disk, and in the page cache as it was written: page by page."""
    path = tmp_path / "weights"
    part = os.urandom(4096)
    with path.open("wb", buffering=0) as file:
        for _ in range(NUM_BYTES // len(part)):
            file.write(part)
        os.fsync(file.fileno())
    return path


def clock_of(seconds: float) -> Callable[[], float]:
    """A clock on which every step takes so long."""
    ticks: Iterator[int] = count()
    return lambda: next(ticks) * seconds


def can_be_large(path: Path) -> bool:
    """Whether this file system has large pieces at all: of a copy that is dropped and read in one go."""
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    with copy.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.read()
    return not has_small_folios(copy)


@tells
def test_a_file_that_was_written_in_parts_is_held_in_large_pieces(written_in_parts: Path) -> None:
    before = written_in_parts.read_bytes()
    if not has_small_folios(written_in_parts) or not can_be_large(written_in_parts):
        pytest.skip("this file system has pieces of one size")
    use_large_folios([written_in_parts], 2 * NUM_BYTES)
    assert not has_small_folios(written_in_parts)
    assert written_in_parts.read_bytes() == before


def test_without_room_nothing_is_read(
    written_in_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[Path]()
    monkeypatch.setattr(page_cache, "has_small_folios", lambda path: True)
    monkeypatch.setattr(page_cache, "reread_file", read.append)
    use_large_folios([written_in_parts], 2 * NUM_BYTES - 1)
    assert read == []
    use_large_folios([written_in_parts], 2 * NUM_BYTES)
    assert read == [written_in_parts]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing is dropped here")
def test_a_slow_disk_is_tried_and_no_more(written_in_parts: Path) -> None:
    assert reread_file(written_in_parts, clock_of(0.01)) == NUM_BYTES
    assert reread_file(written_in_parts, clock_of(2.0)) == TRIED_BYTES


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing is dropped here")
def test_reading_takes_a_chunk_of_memory(written_in_parts: Path) -> None:
    tracemalloc.start()
    try:
        assert reread_file(written_in_parts) in (TRIED_BYTES, NUM_BYTES)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < CHUNK_BYTES + 64 * 1024


def test_what_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.write_bytes(b"")
    assert not has_small_folios(missing) and not has_small_folios(empty)
    assert reread_file(missing) == 0 and reread_file(empty) == 0
    use_large_folios([missing, empty], 1 << 40)

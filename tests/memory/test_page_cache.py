"""The folio sizes in which the page cache holds a file, and rereading the file."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from lowtide.memory.os import file_mappings as file_mappings
from lowtide.memory.os.file_mappings import (
    CHUNK_BYTES,
    PROBE_BYTES,
    has_small_folios,
    reread_file,
    use_large_folios,
)

MIB = 1 << 20
NUM_BYTES = 48 * MIB
needs_folios = pytest.mark.skipif(
    not file_mappings._reveals_folios(), reason="this system does not reveal folio sizes"
)


@pytest.fixture
def written_page_by_page(tmp_path: Path) -> Path:
    """A file on the disk that is in the page cache in small folios, as it was written."""
    path = tmp_path / "weights"
    page = os.urandom(4096)
    with path.open("wb", buffering=0) as file:
        for _ in range(NUM_BYTES // len(page)):
            file.write(page)
        os.fsync(file.fileno())
    return path


def clock_of(seconds: float) -> Callable[[], float]:
    """Return a clock that advances by `seconds` at every call."""
    ticks: Iterator[int] = count()
    return lambda: next(ticks) * seconds


def can_be_large(path: Path) -> bool:
    """Whether this file system has large folios: tries a copy that is dropped and read as a whole."""
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    with copy.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.read()
    return not has_small_folios(copy)


@needs_folios
def test_a_file_in_small_folios_gets_large_ones(written_page_by_page: Path) -> None:
    before = written_page_by_page.read_bytes()
    if not has_small_folios(written_page_by_page) or not can_be_large(written_page_by_page):
        pytest.skip("this file system has folios of one size")
    use_large_folios([written_page_by_page], 2 * NUM_BYTES)
    assert not has_small_folios(written_page_by_page)
    assert written_page_by_page.read_bytes() == before


def test_nothing_is_read_without_room(
    written_page_by_page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[Path]()
    monkeypatch.setattr(file_mappings, "has_small_folios", lambda path: True)
    monkeypatch.setattr(file_mappings, "reread_file", read.append)
    use_large_folios([written_page_by_page], 2 * NUM_BYTES - 1)
    assert read == []
    use_large_folios([written_page_by_page], 2 * NUM_BYTES)
    assert read == [written_page_by_page]


@pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="the page cache cannot be dropped here"
)
def test_a_slow_disk_is_only_probed(written_page_by_page: Path) -> None:
    assert reread_file(written_page_by_page, clock_of(0.01)) == NUM_BYTES
    assert reread_file(written_page_by_page, clock_of(2.0)) == PROBE_BYTES


@pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="the page cache cannot be dropped here"
)
def test_rereading_allocates_one_chunk(written_page_by_page: Path) -> None:
    tracemalloc.start()
    try:
        assert reread_file(written_page_by_page) in (PROBE_BYTES, NUM_BYTES)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < CHUNK_BYTES + 64 * 1024


def test_unreadable_and_empty_files_are_ignored(tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.write_bytes(b"")
    assert not has_small_folios(missing) and not has_small_folios(empty)
    assert reread_file(missing) == 0 and reread_file(empty) == 0
    use_large_folios([missing, empty], 1 << 40)

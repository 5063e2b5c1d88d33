"""Where files are mapped in this process."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from lowtide.memory.os.file_mappings import MAPS, FileMap, read_file_maps


@pytest.mark.skipif(not MAPS.exists(), reason="this system has no /proc/self/maps")
def test_mappings_of_a_file_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a file with spaces"
    path.write_bytes(os.urandom(5 * mmap.PAGESIZE))
    assert read_file_maps(path) == frozenset()
    with path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        part = mmap.mmap(
            file.fileno(), 0, access=mmap.ACCESS_READ, offset=2 * mmap.ALLOCATIONGRANULARITY
        )
        found = read_file_maps(path)
        part.close()
        whole.close()
    assert {(m.num_bytes, m.offset) for m in found} == {
        (5 * mmap.PAGESIZE, 0),
        (3 * mmap.PAGESIZE, 2 * mmap.PAGESIZE),
    }


def test_other_files_and_malformed_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"x")
    status = os.stat(path)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    maps = tmp_path / "maps"
    maps.write_text(
        f"10000-30000 r--s 00002000 {device} {status.st_ino}    {path}\n"
        f"40000-50000 r--s 00000000 {device} {status.st_ino + 1}    {path}\n"
        f"60000-70000 r--s 00000000 ff:ff {status.st_ino}    {path}\n"
        "70000-80000 rw-p 00000000 00:00 0\n"
        "short\n"
    )
    assert read_file_maps(path, maps) == {FileMap(0x10000, 0x20000, 0x2000)}


def test_a_system_without_maps_has_no_mappings(tmp_path: Path) -> None:
    assert read_file_maps(tmp_path, tmp_path / "none") == frozenset()
    assert read_file_maps(tmp_path / "none") == frozenset()

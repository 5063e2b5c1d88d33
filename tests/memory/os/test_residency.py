"""Resident bytes compared with the touched bytes, in a process of its own if the total matters."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_python

from lowtide.memory.os import residency as residency
from lowtide.memory.os.residency import ResidentMemoryMeter, resident_file_bytes


def test_the_meter_separates_memory_from_file_pages(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(b"x" * (24 << 20))
    done = run_python(
        "import mmap\n"
        "from pathlib import Path\n"
        "from lowtide.memory.os.residency import ResidentMemoryMeter, resident_file_bytes\n"
        f"path = Path({str(path)!r})\n"
        "meter = ResidentMemoryMeter(); before = meter.read()\n"
        "block = bytearray(b'x') * (32 << 20); anonymous = meter.read()\n"
        "with path.open('rb') as file: mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "print(resident_file_bytes([path]))\n"
        "touched = sum(mapped[:16 << 20:4096]); files = meter.read()\n"
        "print(anonymous.anonymous_bytes - before.anonymous_bytes)\n"
        "print(files.file_bytes - anonymous.file_bytes)\n"
        "print(resident_file_bytes([path]))"
    )
    assert done.code == 0, done.stderr
    untouched, grown, of_files, counted = map(int, done.stdout.split())
    assert untouched == 0
    assert abs(grown - (32 << 20)) < 1 << 20
    assert abs(of_files - (16 << 20)) < 1 << 20
    assert abs(counted - (16 << 20)) < 1 << 20


def test_resident_pages_of_a_buffer() -> None:
    done = run_python(
        "import mmap, ctypes\n"
        "from lowtide.memory.os.residency import resident_buffer_bytes\n"
        "from lowtide.memory.os.kv_pages import DemandZeroBuffer\n"
        "pages = 20000\n"
        "block = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "block.madvise(mmap.MADV_NOHUGEPAGE)\n"
        "handle = ctypes.c_char.from_buffer(block); at = ctypes.addressof(handle)\n"
        "whole = [DemandZeroBuffer(at, len(block))]\n"
        "print(resident_buffer_bytes(whole))\n"
        "for page in (0, 5, 16383, 16384, pages - 1): ctypes.memset(at + page * 4096, 1, 1)\n"
        "print(resident_buffer_bytes(whole), resident_buffer_bytes([DemandZeroBuffer(at + 100, 10)]))"
    )
    assert done.code == 0, done.stderr
    assert list(map(int, done.stdout.split())) == [0, 5 * 4096, 4096]


def test_a_system_without_these_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    residency._mincore.cache_clear()
    meter = ResidentMemoryMeter()
    assert not meter.separates_files
    now = meter.read()
    assert now.file_bytes == 0 and now.num_bytes > 10 << 20
    assert residency.resident_buffer_bytes([]) is None
    residency._mincore.cache_clear()
    assert resident_file_bytes([Path("/nowhere")]) == 0

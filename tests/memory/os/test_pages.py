"""Isolated pages of mappings, and private memory without large pages."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import pytest

from lowtide.memory.os.file_mappings import read_file_maps
from lowtide.memory.os.pages import PAGE_BYTES, forbid_large_pages, isolate_pages

KIB, MIB = 1 << 10, 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows what is resident")


def resident_bytes(begin: int, end: int) -> int:
    """Sum the resident bytes of the areas inside [begin, end), from /proc/self/smaps."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            area = [int(part, 16) for part in first.split("-")]
            inside = begin <= area[0] and area[1] <= end
        elif first == "Rss:" and inside:
            total += int(line.split()[1]) * KIB
    return total


def test_a_page_fault_maps_no_page_of_another_part(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with path.open("wb", buffering=0) as file:
        file.write(bytes(8 * MIB))  # written at once, so that the page cache may use large folios
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        (file_map,) = read_file_maps(path)
        address = file_map.address
        parts = [0, PAGE_BYTES, 3 * MIB, 3 * MIB + 16 * KIB, 8 * MIB]
        assert isolate_pages([address + part for part in parts])
        assert mapped[3 * MIB] == 0
        read = resident_bytes(address + 3 * MIB, address + 3 * MIB + 16 * KIB)
        assert PAGE_BYTES <= read <= 16 * KIB
        assert resident_bytes(address, address + 8 * MIB) == read


def test_addresses_without_a_mapping_cannot_be_isolated() -> None:
    assert not isolate_pages([PAGE_BYTES, 2 * PAGE_BYTES, 3 * PAGE_BYTES])


def test_memory_without_large_pages_is_allocated_page_by_page() -> None:
    with mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        exported = ctypes.c_char.from_buffer(mapped)
        address = ctypes.addressof(exported)
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(address), ctypes.c_size_t(8 * MIB), 14
        )  # HUGEPAGE
        forbid_large_pages(address, 8 * MIB)
        mapped[4 * MIB] = 1
        assert resident_bytes(address, address + 8 * MIB) == PAGE_BYTES
        del exported

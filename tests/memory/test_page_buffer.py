"""Buffers of whole pages."""

from __future__ import annotations

import mmap

import pytest
from processes import run_python

from lowtide.memory.os.pages import PAGE_BYTES
from lowtide.memory.units import MIB
from lowtide.models.page_buffer import PageBuffer


def test_the_memory_is_writable_and_consists_of_whole_pages() -> None:
    buffer = PageBuffer(PAGE_BYTES + 1)
    assert buffer.num_bytes == 2 * PAGE_BYTES
    assert bytes(buffer.view) == bytes(PAGE_BYTES + 1)
    buffer.view[-1] = 7
    assert buffer.view[PAGE_BYTES] == 7
    buffer.close()
    buffer.close()


def test_a_slice_in_use_prevents_closing() -> None:
    buffer = PageBuffer(100)
    slice = buffer.view[:10]
    with pytest.raises(BufferError):
        buffer.close()
    slice.release()
    buffer.close()


def test_a_system_without_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_named: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="cannot map 4,096 bytes: Cannot allocate memory"):
        PageBuffer(4096)


def test_closing_releases_all_pages_at_once() -> None:
    done = run_python(
        "from lowtide.memory.process import read_process_memory as read\n"
        "from lowtide.models.page_buffer import PageBuffer\n"
        "content = b'x' * (16 << 20)\n"
        "before = read().resident_bytes\n"
        "buffers = [PageBuffer(16 << 20) for _ in range(3)]\n"
        "allocated = read().resident_bytes\n"
        "for buffer in buffers: buffer.view[:] = content\n"
        "written = read().resident_bytes\n"
        "buffers[1].close()\n"
        "print(allocated - before, written - before, read().resident_bytes - before)"
    )
    assert done.code == 0, done.stderr
    allocated, written, closed = map(int, done.stdout.split())
    assert allocated < MIB and abs(written - 48 * MIB) < MIB and abs(closed - 32 * MIB) < MIB

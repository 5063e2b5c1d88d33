from __future__ import annotations

import mmap

import pytest
from processes import run_python

from lowtide.memory.os.pages import PAGE_BYTES, PageBuffer
from lowtide.memory.units import MIB


def test_its_memory_can_be_written_and_is_whole_pages() -> None:
    buffer = PageBuffer(PAGE_BYTES + 1)
    assert buffer.num_bytes == 2 * PAGE_BYTES
    assert bytes(buffer.view) == bytes(PAGE_BYTES + 1)
    buffer.view[-1] = 7
    assert buffer.view[PAGE_BYTES] == 7
    buffer.close()
    buffer.close()


def test_a_part_that_is_in_use_keeps_it_open() -> None:
    buffer = PageBuffer(100)
    part = buffer.view[:10]
    with pytest.raises(BufferError):
        buffer.close()
    part.release()
    buffer.close()


def test_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_arguments: object, **_named: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    with pytest.raises(MemoryError, match="4,096 bytes: Cannot allocate memory"):
        PageBuffer(4096)


def test_closing_gives_everything_back_at_once() -> None:
    done = run_python(
        "from lowtide.memory.process import read_process_memory as read\n"
        "from lowtide.memory.os.pages import PageBuffer\n"
        "content = b'x' * (16 << 20)\n"
        "before = read().resident_bytes\n"
        "buffers = [PageBuffer(16 << 20) for _ in range(3)]\n"
        "made = read().resident_bytes\n"
        "for buffer in buffers: buffer.view[:] = content\n"
        "written = read().resident_bytes\n"
        "buffers[1].close()\n"
        "print(made - before, written - before, read().resident_bytes - before)"
    )
    assert done.code == 0, done.stderr
    made, written, closed = map(int, done.stdout.split())
    assert made < MIB and abs(written - 48 * MIB) < MIB and abs(closed - 32 * MIB) < MIB

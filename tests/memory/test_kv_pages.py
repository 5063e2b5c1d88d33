"""The cache's pages: given back behind the tokens in use, and nowhere else."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_python

from lowtide import Runtime
from lowtide.memory.os import kv_pages as module
from lowtide.memory.os.kv_pages import (
    PAGE_BYTES,
    DemandZeroBuffer,
    KVPageReclaimer,
    can_use_demand_zero,
    demand_zero_buffers,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are left alone elsewhere")

NUM_CELLS, ROW_BYTES, NUM_TENSORS = 256, 192, 4


def pages_over(*buffers: DemandZeroBuffer) -> KVPageReclaimer:
    return KVPageReclaimer(
        buffers, num_tensors=NUM_TENSORS, num_cells=NUM_CELLS, row_bytes=ROW_BYTES
    )


class Cache:
    """Tensors in memory of the system's own, the first `num_used` rows of each filled."""

    def __init__(self, num_used: int) -> None:
        num_bytes = NUM_TENSORS * NUM_CELLS * ROW_BYTES
        self.memory = mmap.mmap(-1, num_bytes + PAGE_BYTES, flags=mmap.MAP_PRIVATE)
        rows = np.frombuffer(self.memory, np.uint8, num_bytes, offset=64)
        self.rows = rows.reshape(NUM_TENSORS, NUM_CELLS, ROW_BYTES)
        self.rows[:, :num_used] = np.random.default_rng(1).integers(1, 256, ROW_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory, 64))
        self.pages = pages_over(DemandZeroBuffer(address, num_bytes))


@settings(max_examples=80, deadline=None)
@given(used=st.integers(1, NUM_CELLS), share=st.floats(0, 1))
def test_what_is_kept_is_kept_and_whole_pages_behind_it_are_gone(used: int, share: float) -> None:
    cache, kept = Cache(used), int(used * share)
    before = cache.rows.copy()
    cache.pages.cut(used, kept)
    assert (cache.rows[:, :kept] == before[:, :kept]).all()
    assert cache.pages.is_working
    if used - kept >= 64:
        row_pages = -(-PAGE_BYTES // ROW_BYTES)
        for tensor in cache.rows:  # a page that two tensors share stays
            assert not tensor[kept + row_pages : NUM_CELLS - row_pages].any()
    else:
        assert (cache.rows == before).all()


def test_a_cache_that_is_not_as_thought_is_left_alone() -> None:
    cache = Cache(100)
    cache.rows[1, 120] = 7  # something lies behind the last token
    before = cache.rows.copy()
    cache.pages.cut(100, 0)
    assert (cache.rows == before).all() and not cache.pages.is_working
    other = Cache(100)
    other.rows[2, 99] = 0  # and here nothing lies where the last token should be
    other.pages.cut(100, 0)
    assert not other.pages.is_working


def test_a_cut_too_small_to_act_on_does_not_end_the_giving_back() -> None:
    cache = Cache(100)
    cache.pages.cut(100, 70)  # fewer cells than are worth it
    cache.pages.cut(90, 0)  # twenty were used again; those behind them still hold what they held
    assert cache.pages.is_working
    assert not cache.rows[0, 30 : NUM_CELLS - 30].any()


@given(used=st.integers(1, NUM_CELLS), share=st.floats(0, 1))
def test_a_trim_leaves_the_cells_in_use_alone(used: int, share: float) -> None:
    cache, kept = Cache(used), int(used * share)
    before = cache.rows.copy()
    cache.pages.cut(used, used)
    cache.pages.trim(used)
    assert (cache.rows == before).all()
    cache.pages.trim(kept)
    assert (cache.rows[:, :kept] == before[:, :kept]).all()
    row_pages = -(-PAGE_BYTES // ROW_BYTES)
    assert not any(t[kept + row_pages : NUM_CELLS - row_pages].any() for t in cache.rows)


def test_buffers_of_another_size_are_left_alone() -> None:
    tensor_bytes = NUM_CELLS * ROW_BYTES
    assert pages_over(DemandZeroBuffer(4096, 4 * tensor_bytes)).is_working
    assert not pages_over(DemandZeroBuffer(4096, 4 * tensor_bytes + 32)).is_working
    assert not pages_over(DemandZeroBuffer(4096, 2 * tensor_bytes)).is_working
    # llama.cpp's row of logits, which is as large as one tensor by chance
    logits = DemandZeroBuffer(1 << 30, tensor_bytes)
    assert pages_over(DemandZeroBuffer(4096, 4 * tensor_bytes), logits).is_working
    assert not pages_over().is_working


def test_a_ggml_that_is_laid_out_in_another_way_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert can_use_demand_zero()
    patch = module._patch()
    assert patch is not None
    theirs = patch._type.allocate
    with demand_zero_buffers():
        assert patch._type.allocate != theirs
    assert patch._type.allocate == theirs
    monkeypatch.setattr(module._BufferType, "get_alignment", 12345)
    assert not module._Patch().fits() and patch._type.allocate == theirs


@pytest.mark.once
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("model", ["smollm2", "gemma3-270m"])
def test_logits_are_the_same_bit_for_bit(
    model: str, kv_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits() -> list[bytes]:
        seen = []
        with Runtime.open(
            model, memory="8GiB", context=2048, kv_type=kv_type, threads=1
        ) as runtime:
            pages = runtime._model.on_cut.__self__  # type: ignore[attr-defined]
            for kept, rows in ((0, 300), (120, 128), (10, 60), (0, 128), (128, 100)):
                runtime._model.truncate(kept)
                for at in range(0, rows, 100):
                    ids = range(5 + at, 5 + min(at + 100, rows))
                    seen.append(runtime._model.forward(list(ids)).tobytes())
            assert pages.is_working == pages._verified == can_use_demand_zero()
        return seen

    released = logits()
    monkeypatch.setattr(module, "_patch", lambda: None)
    monkeypatch.setattr(sys.modules[__name__], "can_use_demand_zero", lambda: False)
    assert logits() == released


def test_the_resident_cache_follows_the_tokens(smollm2: Path) -> None:
    def peaks(context: int) -> tuple[int, int, int]:
        done = run_python(
            "from lowtide import Runtime\n"
            "from lowtide.memory.process import read_process_memory as read\n"
            f"with Runtime.open({str(smollm2)!r}, memory='8GiB', context={context}) as runtime:\n"
            "    opened = read().resident_bytes\n"
            "    runtime.generate('word ' * 420, max_tokens=16)\n"
            "    used = read().resident_bytes\n"
            "    runtime._session.truncate_to_prefix([-1])\n"
            "    print(opened, used, read().resident_bytes)\n"
        )
        assert done.code == 0, done.stderr
        opened, used, cut = map(int, done.stdout.split())
        return opened, used, cut

    small, large = peaks(512), peaks(8192)
    mib = 1 << 20
    assert large[0] - small[0] < 6 * mib  # the whole cache is 169 MiB more
    assert large[1] - small[1] < 10 * mib
    assert large[2] < large[1] - 7 * mib  # 436 tokens of 22.5 KiB

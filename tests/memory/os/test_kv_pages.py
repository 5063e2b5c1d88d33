"""Pages of the KV cache are released behind the last token, and nowhere else."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are released on Linux only")

NUM_SLOTS, TOKEN_BYTES, NUM_TENSORS = 256, 192, 4


def reclaimer_of(*buffers: DemandZeroBuffer) -> KVPageReclaimer:
    return KVPageReclaimer(
        buffers, num_tensors=NUM_TENSORS, num_slots=NUM_SLOTS, token_bytes=TOKEN_BYTES
    )


class Cache:
    """A cache in mapped memory with data in the first `num_used` slots of each tensor."""

    def __init__(self, num_used: int) -> None:
        num_bytes = NUM_TENSORS * NUM_SLOTS * TOKEN_BYTES
        self.memory = mmap.mmap(-1, num_bytes + PAGE_BYTES, flags=mmap.MAP_PRIVATE)
        slots = np.frombuffer(self.memory, np.uint8, num_bytes, offset=64)
        self.slots = slots.reshape(NUM_TENSORS, NUM_SLOTS, TOKEN_BYTES)
        self.slots[:, :num_used] = np.random.default_rng(1).integers(1, 256, TOKEN_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory, 64))
        self.reclaimer = reclaimer_of(DemandZeroBuffer(address, num_bytes))


@given(used=st.integers(1, NUM_SLOTS), share=st.floats(0, 1))
def test_tokens_stay_and_whole_pages_behind_them_are_released(used: int, share: float) -> None:
    cache, num_kept = Cache(used), int(used * share)
    before = cache.slots.copy()
    cache.reclaimer.truncate(used, num_kept)
    assert (cache.slots[:, :num_kept] == before[:, :num_kept]).all()
    assert cache.reclaimer._tensors
    if used - num_kept >= 64:
        slots_per_page = -(-PAGE_BYTES // TOKEN_BYTES)
        for tensor in cache.slots:  # a page that two tensors share is not released
            assert not tensor[num_kept + slots_per_page : NUM_SLOTS - slots_per_page].any()
    else:
        assert (cache.slots == before).all()


def test_a_cache_with_an_unexpected_layout_is_never_released() -> None:
    cache = Cache(100)
    cache.slots[1, 120] = 7  # data behind the last token
    before = cache.slots.copy()
    cache.reclaimer.truncate(100, 0)
    assert (cache.slots == before).all() and not cache.reclaimer._tensors
    other = Cache(100)
    other.slots[2, 99] = 0  # no data where the last token should be
    other.reclaimer.truncate(100, 0)
    assert not other.reclaimer._tensors


def test_a_small_truncation_does_not_stop_later_releases() -> None:
    cache = Cache(100)
    cache.reclaimer.truncate(100, 70)  # too few slots to release
    cache.reclaimer.truncate(
        90, 0
    )  # 20 slots were used again; the slots behind them still have data
    assert cache.reclaimer._tensors
    assert not cache.slots[0, 30 : NUM_SLOTS - 30].any()


@given(used=st.integers(1, NUM_SLOTS), share=st.floats(0, 1))
def test_releasing_pages_does_not_touch_slots_in_use(used: int, share: float) -> None:
    cache, num_kept = Cache(used), int(used * share)
    before = cache.slots.copy()
    cache.reclaimer.truncate(used, used)
    cache.reclaimer.release_pages(used)
    assert (cache.slots == before).all()
    cache.reclaimer.release_pages(num_kept)
    assert (cache.slots[:, :num_kept] == before[:, :num_kept]).all()
    slots_per_page = -(-PAGE_BYTES // TOKEN_BYTES)
    assert not any(
        t[num_kept + slots_per_page : NUM_SLOTS - slots_per_page].any() for t in cache.slots
    )


def test_buffers_of_another_size_are_ignored() -> None:
    tensor_bytes = NUM_SLOTS * TOKEN_BYTES
    assert reclaimer_of(DemandZeroBuffer(4096, 4 * tensor_bytes))._tensors
    assert not reclaimer_of(DemandZeroBuffer(4096, 4 * tensor_bytes + 32))._tensors
    assert not reclaimer_of(DemandZeroBuffer(4096, 2 * tensor_bytes))._tensors
    # llama.cpp's logits, which have the size of a tensor by chance
    logits = DemandZeroBuffer(1 << 30, tensor_bytes)
    assert reclaimer_of(DemandZeroBuffer(4096, 4 * tensor_bytes), logits)._tensors
    assert not reclaimer_of()._tensors


def test_another_layout_of_ggml_is_not_patched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert can_use_demand_zero()
    patch = module._patch()
    assert patch is not None
    original = patch._type.allocate
    with demand_zero_buffers():
        assert patch._type.allocate != original
    assert patch._type.allocate == original
    monkeypatch.setattr(module._BufferType, "get_alignment", 12345)
    assert not module._Patch().fits() and patch._type.allocate == original


@pytest.mark.real
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("model", ["smollm2", "gemma3-270m"])
def test_logits_are_the_same_bit_for_bit(
    model: str, kv_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits() -> list[bytes]:
        found = []
        with Runtime.open(
            model, memory="8GiB", context=2048, kv_type=kv_type, threads=1
        ) as runtime:
            pages = runtime._model._pages  # type: ignore[attr-defined]
            for num_tokens, batch in ((0, 300), (120, 128), (10, 60), (0, 128), (128, 100)):
                runtime._model.truncate(num_tokens)
                for at in range(0, batch, 100):
                    ids = range(5 + at, 5 + min(at + 100, batch))
                    found.append(runtime._model.forward(list(ids)).tobytes())
            assert bool(pages._tensors) == pages._verified == can_use_demand_zero()
        return found

    released = logits()
    monkeypatch.setattr(module, "_patch", lambda: None)
    monkeypatch.setattr(sys.modules[__name__], "can_use_demand_zero", lambda: False)
    assert logits() == released


def test_the_resident_cache_grows_and_shrinks_with_the_tokens(smollm2: Path) -> None:
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
        opened, used, truncated = map(int, done.stdout.split())
        return opened, used, truncated

    small, large = peaks(512), peaks(8192)
    mib = 1 << 20
    assert large[0] - small[0] < 6 * mib  # the whole cache is 169 MiB more
    assert large[1] - small[1] < 10 * mib
    assert large[2] < large[1] - 7 * mib  # 436 tokens of 22.5 KiB

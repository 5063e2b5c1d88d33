"""Delta by blocks in the native library, against numpy in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_calls import AttentionInputs, BlocksLayer, attend
from reference import (
    delta_attention,
    quantise_q4_0,
    quantise_q8_0,
    reference_blocks,
)

from lowtide.attention.bindings.library import usable_kernel_sets
from lowtide.attention.bindings.structs import DeltaBlocksRule
from lowtide.models.errors import LowtideError

WINDOW, FIXED, PAGE = 96, 4, 64
KV_HEADS, HEADS = 3, 6
SLOTS, SIZE = 448, 64
SCALES = np.linspace(0.5, 2, KV_HEADS * SIZE).reshape(KV_HEADS, SIZE).astype(np.float32)
THRESHOLDS = np.array(
    [0.123, 0.257, 0.391], np.float32
)  # no difference of two halves is near one of these
ANY = np.ones(KV_HEADS, np.float32)
BLOCKS = pytest.mark.parametrize("block", [1, 8, 16], ids="element 8 16".split())


class Cache:
    """Keys that drift and random values in a cache of a type, and passes over them."""

    def __init__(self, kv_type: str = "f16", seed: int = 0, size: int = SIZE) -> None:
        rng = np.random.default_rng(seed)
        self.kv_type, self.size = kv_type, size
        self.q = rng.standard_normal((SLOTS, HEADS, size)).astype(np.float32)
        steps = rng.standard_normal((SLOTS, KV_HEADS, size)).astype(np.float32)
        drift = np.cumsum(steps * 0.4, axis=0) / np.sqrt(1 + 0.05 * np.arange(SLOTS))[:, None, None]
        values = rng.standard_normal((SLOTS, KV_HEADS, size)).astype(np.float32)
        self.k, self.k_meant = self._store(drift.astype(np.float32))
        self.v, self.v_meant = self._store(values)

    def _store(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.kv_type == "f16":
            halves = values.astype(np.float16)
            return halves, halves.astype(np.float64)
        return (quantise_q8_0 if self.kv_type == "q8_0" else quantise_q4_0)(values)

    def rows(self, begin: int, end: int) -> AttentionInputs:
        """Return the inputs of the pass that appends these tokens; later slots hold other values."""
        mask = np.where(np.arange(SLOTS) <= np.arange(begin, end)[:, None], 0, -np.inf)
        return AttentionInputs(
            q=self.q[begin:end],
            k=self.k,
            v=self.v,
            mask=mask.astype(np.float16),
            value_dim=self.size,
            scale=0.125,
            kv_type=self.kv_type,
        )

    def merged(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the merged keys of whole pages, in half precision, and which blocks are stored, by head."""
        whole = SLOTS // PAGE * PAGE
        keys = self.k_meant.astype(np.float16).astype(np.float64)
        found = [
            reference_blocks(
                keys[:whole, head],
                THRESHOLDS[head].astype(np.float64) / SCALES[head, : self.size],
                num_first=FIXED,
                block=block,
            )
            for head in range(KV_HEADS)
        ]
        merged = np.stack([keys for keys, _ in found]).astype(np.float16).astype(np.float64)
        return merged, np.stack([stored for _, stored in found])

    def expected(self, begin: int, end: int, block: int, refine: float = 0.0) -> np.ndarray:
        """Return the oracle's result."""
        group, merged = HEADS // KV_HEADS, self.merged(block)[0]
        by_head = [
            delta_attention(
                self.q[begin:end, head * group : (head + 1) * group],
                self.k_meant[:end, head, None],
                self.v_meant[:end, head, None],
                merged[head][:, None],
                scale=0.125,
                window=WINDOW,
                page=PAGE,
                refine=refine,
            )
            for head in range(KV_HEADS)
        ]
        return np.concatenate(by_head, axis=1)


def new_layer(
    block: int,
    window: int = WINDOW,
    thresholds: np.ndarray = THRESHOLDS,
    shares: np.ndarray = ANY,
    size: int = SIZE,
    refine: float = 0.0,
) -> BlocksLayer:
    scales = np.ascontiguousarray(SCALES[:, :size])
    return BlocksLayer(DeltaBlocksRule(window, FIXED, block, refine), thresholds, shares, scales)


@pytest.fixture
def layer() -> Iterator[BlocksLayer]:
    with closing(new_layer(8)) as made:
        yield made


@BLOCKS
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("kernels", usable_kernel_sets())
def test_prompt_and_decode(kernels: str, kv_type: str, block: int) -> None:
    cache = Cache(kv_type)
    with closing(new_layer(block)) as layer:
        for begin, end in ((0, 300), (300, 301), (301, 305)):
            found = layer.attend(cache.rows(begin, end), kernels=kernels, threads=2)[-20:]
            expected = cache.expected(max(end - 20, begin), end, block)
            # Dequantised keys are stored in half precision.
            most = 2e-5 if kv_type == "f16" else 1e-3
            assert np.abs(found - expected).max() <= most * np.abs(expected).max()


@BLOCKS
@pytest.mark.parametrize("kernels", usable_kernel_sets())
def test_keys_with_much_attention_weight_are_refined(kernels: str, block: int) -> None:
    cache = Cache()
    with closing(new_layer(block, refine=0.01)) as layer, closing(new_layer(block)) as unrefined:
        for begin, end in ((0, 300), (300, 301), (301, 310)):
            found = layer.attend(cache.rows(begin, end), kernels=kernels, threads=2)[-9:]
            merged = unrefined.attend(cache.rows(begin, end), kernels=kernels)[-9:]
            expected = cache.expected(max(end - 9, begin), end, block, refine=0.01)
            assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
            assert np.abs(found - merged).max() > 1e-2 * np.abs(expected).max()
        num_refined, left = divmod(
            layer.counts.channels_multiplied - unrefined.counts.channels_multiplied, SIZE
        )
        more_bytes = layer.counts.key_bytes_read - unrefined.counts.key_bytes_read
    assert left == 0 and 0 < num_refined < 3 * 310 * KV_HEADS
    assert more_bytes == 2 * SIZE * num_refined


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("kernels", usable_kernel_sets())
def test_with_every_key_refined_attention_is_dense(kernels: str, kv_type: str) -> None:
    cache = Cache(kv_type, seed=8)
    with closing(new_layer(8, refine=1e-12)) as layer:
        for rows in (cache.rows(0, 400), cache.rows(400, 401), cache.rows(401, 407)):
            for inputs in (
                rows,
                replace(rows, softcap=5.0),
                replace(rows, sinks=np.linspace(-1, 3, HEADS).astype(np.float32)),
            ):
                found = layer.attend(inputs, kernels=kernels, threads=3)
                # Dequantised keys that are stored whole are stored in half precision.
                most = 1e-4 if kv_type == "f16" else 2e-3
                assert np.abs(found - attend(inputs)).max() <= most


@BLOCKS
@pytest.mark.parametrize("size", [16, 48, 32])
def test_heads_of_other_sizes(block: int, size: int) -> None:
    cache = Cache(size=size)
    with closing(new_layer(block, size=size)) as layer:
        found = layer.attend(cache.rows(0, 330))[-20:]
    expected = cache.expected(310, 330, block)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@BLOCKS
def test_stored_channels_are_counted(block: int) -> None:
    cache = Cache()
    _, stored = cache.merged(block)
    with closing(new_layer(block)) as layer:
        layer.attend(cache.rows(0, 410))
        counts = layer.counts
    pages = (410 - WINDOW) // PAGE
    num_stored = int(stored[:, : pages * PAGE].sum()) * block
    assert counts.channels_merged == pages * PAGE * SIZE * KV_HEADS
    assert counts.channels_stored == num_stored
    assert 0.1 < num_stored / counts.channels_merged < 0.9
    beside = (410 - pages * PAGE) * SIZE * KV_HEADS
    assert counts.channels_total == 410 * SIZE * KV_HEADS
    assert counts.channels_multiplied == num_stored + beside
    by_page = stored[:, : pages * PAGE].reshape(KV_HEADS, pages, PAGE, -1).sum(axis=2)
    indices = np.where(by_page <= 16, PAGE // 2, PAGE).sum() + by_page.size
    assert counts.key_bytes_total == 2 * counts.channels_total
    assert counts.key_bytes_read == 2 * counts.channels_multiplied + indices


@pytest.mark.parametrize("refine", [0.0, 0.01])
def test_a_token_is_bitwise_the_same_in_any_batch_and_with_any_number_of_threads(
    refine: float,
) -> None:
    cache, results = Cache(), []
    for block in (1, 8, 16):
        for passes, threads in (
            ([(0, 400)], 1),
            ([(0, 400)], 3),
            ([(0, 130), (130, 399), (399, 400)], 2),
            ([(row, row + 1) for row in range(400)], 1),
        ):
            with closing(new_layer(block, refine=refine)) as layer:
                found = [layer.attend(cache.rows(*rows), threads=threads) for rows in passes]
            results.append(np.concatenate(found))
        assert all(np.array_equal(results[-4], other) for other in results[-3:])


@BLOCKS
@given(data=st.data())
@settings(deadline=None, max_examples=15)
def test_truncating_and_appending_equals_starting_afresh(block: int, data: st.DataObject) -> None:
    """However the cache was filled, truncated and filled again: its blocks are those of its keys."""
    cache, at = Cache(seed=1), 0
    shares = np.array(data.draw(st.sampled_from([[1, 1, 1], [0.5, 1, 0.2]])), np.float32)
    with closing(new_layer(block, shares=shares)) as layer:
        for seed in (1, 2, 3):
            other, at = Cache(seed=seed), data.draw(st.integers(0, min(at, 379)))
            cache.k[at:], cache.v[at:], cache.q[at:] = other.k[at:], other.v[at:], other.q[at:]
            while at < 380:
                end = min(at + data.draw(st.sampled_from([1, 7, 64, 129, 300])), SLOTS)
                found = layer.attend(cache.rows(at, end))
                at = end
    with closing(new_layer(block, shares=shares)) as fresh:
        assert np.array_equal(found, fresh.attend(cache.rows(0, at))[-len(found) :])


def test_slots_that_other_passes_filled_are_read(layer: BlocksLayer) -> None:
    cache = Cache(seed=3)
    found = layer.attend(cache.rows(420, 421))
    with closing(new_layer(8)) as fresh:
        assert np.array_equal(found, fresh.attend(cache.rows(0, 421))[-1:])


@BLOCKS
@pytest.mark.parametrize(
    ("window", "thresholds"), [(SLOTS, THRESHOLDS), (WINDOW, np.zeros(3, np.float32))]
)
def test_a_window_over_everything_and_no_threshold_are_dense(
    window: int, thresholds: np.ndarray, block: int
) -> None:
    cache = Cache(seed=4)
    with closing(new_layer(block, window, thresholds)) as layer:
        found = layer.attend(cache.rows(0, 400))
        skipped = layer.counts.channels_merged - layer.counts.channels_stored
    expected = attend(cache.rows(0, 400))
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    # Elements of a page may be equal; blocks of them are not.
    assert skipped <= 0.02 * 400 * SIZE * KV_HEADS if block == 1 else skipped == 0


@BLOCKS
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_every_page_stores_its_share(block: int, share: float) -> None:
    cache, shares = Cache(seed=5), np.full(KV_HEADS, share, np.float32)
    with closing(new_layer(block, shares=shares)) as layer:
        counts, before = [], 0
        for end in range(WINDOW + PAGE, 440, PAGE):
            layer.attend(cache.rows(0 if end == WINDOW + PAGE else end - PAGE, end))
            counts.append(layer.counts.channels_stored - before)
            before = layer.counts.channels_stored
    shares_of_pages = np.diff(np.array([0, *counts])) / (PAGE * SIZE * KV_HEADS)
    whole = FIXED / PAGE
    assert share * 0.9 - whole <= shares_of_pages[0] <= share + whole
    assert ((share * 0.8 <= shares_of_pages[1:]) & (shares_of_pages[1:] <= share)).all()


def test_other_masks_are_left_to_dense_attention(layer: BlocksLayer) -> None:
    cache = Cache(seed=6)
    layer.attend(cache.rows(0, 300))
    rows = cache.rows(300, 301)
    rows.mask[0, :40] = -np.inf  # a sliding window's
    assert not layer.attend(rows).any()
    # What that pass wrote is merged again.
    cache.k[:] = Cache(seed=7).k
    found = layer.attend(cache.rows(301, 302))
    with closing(new_layer(8)) as fresh:
        assert np.array_equal(found, fresh.attend(cache.rows(301, 302)))


def test_soft_caps_and_sinks(layer: BlocksLayer) -> None:
    cache = Cache(seed=8)
    sinks = np.linspace(-1, 3, HEADS).astype(np.float32)
    plain = cache.rows(0, 400)
    with closing(new_layer(8, thresholds=np.zeros(3, np.float32))) as exact:
        for inputs in (replace(plain, softcap=5.0), replace(plain, sinks=sinks)):
            assert np.abs(exact.attend(inputs) - attend(inputs)).max() <= 2e-5


@pytest.mark.parametrize(("block", "window"), [(0, 96), (4, 96), (64, 96), (8, 0), (8, -1)])
def test_an_unsupported_block_or_window_is_refused(block: int, window: int) -> None:
    with pytest.raises(LowtideError, match="heads of 64 channels cannot have blocks of"):
        new_layer(block, window)

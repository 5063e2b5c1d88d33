"""Attention over states in the native library, against numpy in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    delta_attention,
    quantise_q4_0,
    quantise_q8_0,
    reference_states,
)

from lowtide.attention.bindings.structs import (
    AttentionInputs,
    StatesLayer,
    StatesRule,
    attend,
    usable_kernel_sets,
)
from lowtide.models.errors import LowtideError

WINDOW, FIXED, PAGE = 96, 4, 64
KV_HEADS, HEADS = 3, 6
CELLS, SIZE = 448, 64
SCALES = np.linspace(0.5, 2, KV_HEADS * SIZE).reshape(KV_HEADS, SIZE).astype(np.float32)
THRESHOLDS = np.array([0.123, 0.257, 0.391], np.float32)  # not where a difference of halves may lie
ANY = np.ones(KV_HEADS, np.float32)
BLOCKS = pytest.mark.parametrize("block", [1, 8, 16], ids="element 8 16".split())


class Cache:
    """Keys that drift and random values in a cache of a type, and passes over them."""

    def __init__(self, kv_type: str = "f16", seed: int = 0, size: int = SIZE) -> None:
        rng = np.random.default_rng(seed)
        self.kv_type, self.size = kv_type, size
        self.q = rng.standard_normal((CELLS, HEADS, size)).astype(np.float32)
        steps = rng.standard_normal((CELLS, KV_HEADS, size)).astype(np.float32)
        drift = np.cumsum(steps * 0.4, axis=0) / np.sqrt(1 + 0.05 * np.arange(CELLS))[:, None, None]
        values = rng.standard_normal((CELLS, KV_HEADS, size)).astype(np.float32)
        self.k, self.k_meant = self._store(drift.astype(np.float32))
        self.v, self.v_meant = self._store(values)

    def _store(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.kv_type == "f16":
            halves = values.astype(np.float16)
            return halves, halves.astype(np.float64)
        return (quantise_q8_0 if self.kv_type == "q8_0" else quantise_q4_0)(values)

    def rows(self, begin: int, end: int) -> AttentionInputs:
        """The pass that appends these rows; cells behind them hold what no row sees."""
        mask = np.where(np.arange(CELLS) <= np.arange(begin, end)[:, None], 0, -np.inf)
        return AttentionInputs(
            q=self.q[begin:end],
            k=self.k,
            v=self.v,
            mask=mask.astype(np.float16),
            value_dim=self.size,
            scale=0.125,
            kv_type=self.kv_type,
        )

    def states(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The states of whole pages, in half precision, and which blocks were sent, heads outermost."""
        whole = CELLS // PAGE * PAGE
        kept = self.k_meant.astype(np.float16).astype(np.float64)
        found = [
            reference_states(
                kept[:whole, head],
                THRESHOLDS[head].astype(np.float64) / SCALES[head, : self.size],
                num_first=FIXED,
                block=block,
            )
            for head in range(KV_HEADS)
        ]
        kept_as = np.stack([states for states, _ in found]).astype(np.float16).astype(np.float64)
        return kept_as, np.stack([sent for _, sent in found])

    def expected(self, begin: int, end: int, block: int, refine: float = 0.0) -> np.ndarray:
        """What numpy makes of it."""
        group, states = HEADS // KV_HEADS, self.states(block)[0]
        of_heads = [
            delta_attention(
                self.q[begin:end, head * group : (head + 1) * group],
                self.k_meant[:end, head, None],
                self.v_meant[:end, head, None],
                states[head][:, None],
                scale=0.125,
                window=WINDOW,
                page=PAGE,
                refine=refine,
            )
            for head in range(KV_HEADS)
        ]
        return np.concatenate(of_heads, axis=1)


def new_layer(
    block: int,
    window: int = WINDOW,
    thresholds: np.ndarray = THRESHOLDS,
    shares: np.ndarray = ANY,
    size: int = SIZE,
    refine: float = 0.0,
) -> StatesLayer:
    scales = np.ascontiguousarray(SCALES[:, :size])
    return StatesLayer(StatesRule(window, FIXED, block, refine), thresholds, shares, scales)


@pytest.fixture
def layer() -> Iterator[StatesLayer]:
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
            # What a quantised type stands for is kept in half precision.
            most = 2e-5 if kv_type == "f16" else 1e-3
            assert np.abs(found - expected).max() <= most * np.abs(expected).max()


@BLOCKS
@pytest.mark.parametrize("kernels", usable_kernel_sets())
def test_states_that_get_much_of_a_heads_weight_are_opened(kernels: str, block: int) -> None:
    cache = Cache()
    with closing(new_layer(block, refine=0.01)) as layer, closing(new_layer(block)) as closed:
        for begin, end in ((0, 300), (300, 301), (301, 310)):
            found = layer.attend(cache.rows(begin, end), kernels=kernels, threads=2)[-9:]
            unopened = closed.attend(cache.rows(begin, end), kernels=kernels)[-9:]
            expected = cache.expected(max(end - 9, begin), end, block, refine=0.01)
            assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
            assert np.abs(found - unopened).max() > 1e-2 * np.abs(expected).max()
        num_opened, left = divmod(
            layer.counts.channels_multiplied - closed.counts.channels_multiplied, SIZE
        )
        more_bytes = layer.counts.key_bytes_read - closed.counts.key_bytes_read
    assert left == 0 and 0 < num_opened < 3 * 310 * KV_HEADS
    assert more_bytes == 2 * SIZE * num_opened


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("kernels", usable_kernel_sets())
def test_with_every_state_opened_attention_is_dense(kernels: str, kv_type: str) -> None:
    cache = Cache(kv_type, seed=8)
    with closing(new_layer(8, refine=1e-12)) as layer:
        for rows in (cache.rows(0, 400), cache.rows(400, 401), cache.rows(401, 407)):
            for inputs in (
                rows,
                replace(rows, softcap=5.0),
                replace(rows, sinks=np.linspace(-1, 3, HEADS).astype(np.float32)),
            ):
                found = layer.attend(inputs, kernels=kernels, threads=3)
                # What a quantised type stands for is kept in half precision where it was sent whole.
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
def test_what_was_sent_is_counted(block: int) -> None:
    cache = Cache()
    _, sent = cache.states(block)
    with closing(new_layer(block)) as layer:
        layer.attend(cache.rows(0, 410))
        counts = layer.counts
    pages = (410 - WINDOW) // PAGE
    num_sent = int(sent[:, : pages * PAGE].sum()) * block
    assert counts.channels_behind == pages * PAGE * SIZE * KV_HEADS
    assert counts.channels_sent == num_sent
    assert 0.1 < num_sent / counts.channels_behind < 0.9
    beside = (410 - pages * PAGE) * SIZE * KV_HEADS
    assert counts.channels_held == 410 * SIZE * KV_HEADS
    assert counts.channels_multiplied == num_sent + beside
    of_pages = sent[:, : pages * PAGE].reshape(KV_HEADS, pages, PAGE, -1).sum(axis=2)
    groups = np.where(of_pages <= 16, PAGE // 2, PAGE).sum() + of_pages.size
    assert counts.key_bytes_held == 2 * counts.channels_held
    assert counts.key_bytes_read == 2 * counts.channels_multiplied + groups


@pytest.mark.parametrize("refine", [0.0, 0.01])
def test_a_row_is_bitwise_the_same_in_any_batch_and_with_any_number_of_threads(
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
def test_truncating_and_appending_is_building_afresh(block: int, data: st.DataObject) -> None:
    """However a cache came to be, with rows taken back and others put there: the states are its keys'."""
    cache, at = Cache(seed=1), 0
    shares = np.array(data.draw(st.sampled_from([[1, 1, 1], [0.5, 1, 0.2]])), np.float32)
    with closing(new_layer(block, shares=shares)) as layer:
        for seed in (1, 2, 3):
            other, at = Cache(seed=seed), data.draw(st.integers(0, min(at, 379)))
            cache.k[at:], cache.v[at:], cache.q[at:] = other.k[at:], other.v[at:], other.q[at:]
            while at < 380:
                end = min(at + data.draw(st.sampled_from([1, 7, 64, 129, 300])), CELLS)
                found = layer.attend(cache.rows(at, end))
                at = end
    with closing(new_layer(block, shares=shares)) as fresh:
        assert np.array_equal(found, fresh.attend(cache.rows(0, at))[-len(found) :])


def test_cells_that_other_passes_filled_are_read(layer: StatesLayer) -> None:
    cache = Cache(seed=3)
    found = layer.attend(cache.rows(420, 421))
    with closing(new_layer(8)) as fresh:
        assert np.array_equal(found, fresh.attend(cache.rows(0, 421))[-1:])


@BLOCKS
@pytest.mark.parametrize(
    ("window", "thresholds"), [(CELLS, THRESHOLDS), (WINDOW, np.zeros(3, np.float32))]
)
def test_a_window_over_everything_and_no_threshold_are_dense(
    window: int, thresholds: np.ndarray, block: int
) -> None:
    cache = Cache(seed=4)
    with closing(new_layer(block, window, thresholds)) as layer:
        found = layer.attend(cache.rows(0, 400))
        skipped = layer.counts.channels_behind - layer.counts.channels_sent
    expected = attend(cache.rows(0, 400))
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    # Elements of a page may be equal; blocks of them are not.
    assert skipped <= 0.02 * 400 * SIZE * KV_HEADS if block == 1 else skipped == 0


@BLOCKS
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_a_share_is_kept_on_every_page(block: int, share: float) -> None:
    cache, shares = Cache(seed=5), np.full(KV_HEADS, share, np.float32)
    with closing(new_layer(block, shares=shares)) as layer:
        counts, before = [], 0
        for end in range(WINDOW + PAGE, 440, PAGE):
            layer.attend(cache.rows(0 if end == WINDOW + PAGE else end - PAGE, end))
            counts.append(layer.counts.channels_sent - before)
            before = layer.counts.channels_sent
    of_page = np.diff(np.array([0, *counts])) / (PAGE * SIZE * KV_HEADS)
    whole = FIXED / PAGE
    assert share * 0.9 - whole <= of_page[0] <= share + whole
    assert ((share * 0.8 <= of_page[1:]) & (of_page[1:] <= share)).all()


def test_masks_of_another_kind_are_left_to_dense_attention(layer: StatesLayer) -> None:
    cache = Cache(seed=6)
    layer.attend(cache.rows(0, 300))
    rows = cache.rows(300, 301)
    rows.mask[0, :40] = -np.inf  # a sliding window's
    assert not layer.attend(rows).any()
    # What that pass wrote is not taken for what was there before.
    cache.k[:] = Cache(seed=7).k
    found = layer.attend(cache.rows(301, 302))
    with closing(new_layer(8)) as fresh:
        assert np.array_equal(found, fresh.attend(cache.rows(301, 302)))


def test_soft_caps_and_sinks(layer: StatesLayer) -> None:
    cache = Cache(seed=8)
    sinks = np.linspace(-1, 3, HEADS).astype(np.float32)
    plain = cache.rows(0, 400)
    with closing(new_layer(8, thresholds=np.zeros(3, np.float32))) as exact:
        for inputs in (replace(plain, softcap=5.0), replace(plain, sinks=sinks)):
            assert np.abs(exact.attend(inputs) - attend(inputs)).max() <= 2e-5


@pytest.mark.parametrize(("block", "window"), [(0, 96), (4, 96), (64, 96), (8, 0), (8, -1)])
def test_what_cannot_be_sent_is_refused(block: int, window: int) -> None:
    with pytest.raises(LowtideError, match="cannot be sent of heads of 64: 1, 8 or 16"):
        new_layer(block, window)

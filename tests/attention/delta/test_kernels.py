"""Delta by tokens in the native library, against numpy in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from kernel_calls import AttentionInputs, GroupedLayer, attend
from reference import grouped_attention, quantise_q4_0, quantise_q8_0

from lowtide.attention.bindings.library import usable_kernel_sets
from lowtide.attention.bindings.structs import DeltaRowsRule
from lowtide.models.errors import LowtideError

WINDOW, FIXED = 96, 4
NUM_GROUPS = np.array([24, 40, 64], np.uint8)
SCORE_BIAS = np.array([0, 0.2, 0.4], np.float32)
KV_HEADS, HEADS = 3, 6
SLOTS, SIZE = 512, 64
SCALES = np.linspace(0.5, 2, KV_HEADS * SIZE).reshape(KV_HEADS, SIZE).astype(np.float32)


class Cache:
    """Random keys and values in a cache of a type, and passes over them."""

    def __init__(self, kv_type: str = "f16", seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.kv_type = kv_type
        self.q = rng.standard_normal((SLOTS, HEADS, SIZE)).astype(np.float32)
        drawn = [rng.standard_normal((SLOTS, KV_HEADS, SIZE)).astype(np.float32) for _ in range(2)]
        stored = [self._store(values) for values in drawn]
        self.k, self.k_meant = stored[0]
        self.v, self.v_meant = stored[1]

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
            value_dim=SIZE,
            scale=0.125,
            kv_type=self.kv_type,
        )

    def expected(self, begin: int, end: int, refine: float = 0.0) -> np.ndarray:
        """Return the oracle's result."""
        group = HEADS // KV_HEADS
        by_head = [
            grouped_attention(
                self.q[begin:end, head * group : (head + 1) * group],
                self.k_meant[:end, head],
                self.v_meant[:end, head],
                SCALES[head].astype(np.float64),
                scale=0.125,
                window=WINDOW,
                num_groups=int(NUM_GROUPS[head]),
                num_sink_tokens=FIXED,
                score_bias=float(SCORE_BIAS[head]),
                refine=refine,
            )
            for head in range(KV_HEADS)
        ]
        return np.concatenate(by_head, axis=1)


@pytest.fixture
def layer() -> Iterator[GroupedLayer]:
    with closing(new_layer()) as made:
        yield made


def new_layer(
    window: int = WINDOW, num_groups: np.ndarray = NUM_GROUPS, refine: float = 0.0
) -> GroupedLayer:
    return GroupedLayer(DeltaRowsRule(window, FIXED, refine), num_groups, SCORE_BIAS, SCALES)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("kernels", usable_kernel_sets())
def test_prompt_and_decode(kernels: str, kv_type: str, layer: GroupedLayer) -> None:
    cache = Cache(kv_type)
    for begin, end in ((0, 300), (300, 301), (301, 305)):
        found, num_read = layer.attend(cache.rows(begin, end), kernels=kernels, threads=2)
        found, expected = found[-20:], cache.expected(max(end - 20, begin), end)
        # Means and dequantised keys are stored in half precision.
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
    num_pages = (305 - WINDOW) // 64
    assert num_read == num_pages * NUM_GROUPS.sum() // KV_HEADS + 305 - num_pages * 64


@pytest.mark.parametrize("kernels", usable_kernel_sets())
def test_groups_with_much_attention_weight_are_refined(kernels: str) -> None:
    cache = Cache()
    with closing(new_layer(refine=0.01)) as layer, closing(new_layer()) as unrefined:
        for begin, end in ((0, 300), (300, 301), (301, 310)):
            found, num_read = layer.attend(cache.rows(begin, end), kernels=kernels, threads=2)
            merged, least_read = unrefined.attend(cache.rows(begin, end), kernels=kernels)
            found, expected = found[-9:], cache.expected(max(end - 9, begin), end, refine=0.01)
            assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
            assert np.abs(found - merged[-9:]).max() > 1e-2 * np.abs(expected).max()
            assert least_read < num_read < end


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("kernels", usable_kernel_sets())
def test_with_every_group_refined_attention_is_dense(kernels: str, kv_type: str) -> None:
    cache = Cache(kv_type, seed=8)
    with closing(new_layer(refine=1e-12)) as layer:
        for rows in (cache.rows(0, 400), cache.rows(400, 401), cache.rows(401, 407)):
            for inputs in (
                rows,
                replace(rows, softcap=5.0),
                replace(rows, sinks=np.linspace(-1, 3, HEADS).astype(np.float32)),
            ):
                found, _ = layer.attend(inputs, kernels=kernels, threads=3)
                # Dequantised keys are stored in half precision beside the groups.
                most = 1e-4 if kv_type == "f16" else 2e-3
                assert np.abs(found - attend(inputs)).max() <= most


@pytest.mark.parametrize("refine", [0.0, 0.01])
def test_a_token_is_bitwise_the_same_in_any_batch_and_with_any_number_of_threads(
    refine: float,
) -> None:
    cache, results = Cache(), []
    for passes, threads in (
        ([(0, 400)], 1),
        ([(0, 400)], 3),
        ([(0, 130), (130, 399), (399, 400)], 2),
    ):
        with closing(new_layer(refine=refine)) as layer:
            found = [layer.attend(cache.rows(*rows), threads=threads)[0] for rows in passes]
            results.append(np.concatenate(found))
    with closing(new_layer(refine=refine)) as layer:
        found = [layer.attend(cache.rows(row, row + 1))[0] for row in range(400)]
        results.append(np.concatenate(found))
    for other in results[1:]:
        assert np.array_equal(results[0], other)


@pytest.mark.parametrize("num_tokens", [399, 350, 320, 260, 200, 64, 1])
def test_truncating_equals_never_having_read_on(num_tokens: int, layer: GroupedLayer) -> None:
    cache, other = Cache(seed=1), Cache(seed=2)
    layer.attend(cache.rows(0, 400))
    for array, new in ((cache.k, other.k), (cache.v, other.v), (cache.q, other.q)):
        array[num_tokens:] = new[num_tokens:]
    found, _ = layer.attend(cache.rows(num_tokens, 440))
    with closing(new_layer()) as fresh:
        expected = fresh.attend(cache.rows(0, 440))[0][num_tokens:]
    assert np.array_equal(found, expected)


def test_slots_that_other_passes_filled_are_read(layer: GroupedLayer) -> None:
    cache = Cache(seed=3)
    found, _ = layer.attend(cache.rows(420, 421))
    with closing(new_layer()) as fresh:
        assert np.array_equal(found, fresh.attend(cache.rows(0, 421))[0][-1:])


@pytest.mark.parametrize(
    ("window", "num_groups"), [(SLOTS, NUM_GROUPS), (WINDOW, np.array([63, 64, 64], np.uint8))]
)
def test_a_window_over_everything_and_pages_without_groups_are_dense(
    window: int, num_groups: np.ndarray
) -> None:
    cache = Cache(seed=4)
    cache.k[1::2] = cache.k[::2]  # one group less loses nothing then
    cache.v[1::2] = cache.v[::2]
    with closing(new_layer(window, num_groups)) as layer:
        found, num_read = layer.attend(cache.rows(0, 400))
    expected = attend(cache.rows(0, 400))
    # The weight of a group of two is stored in half precision, too.
    assert np.abs(found - expected).max() <= 5e-5 * np.abs(expected).max()
    num_pages = max(400 - window, 0) // 64
    assert num_read == (3 * 400 - num_pages) // 3


def test_other_masks_are_left_to_dense_attention(layer: GroupedLayer) -> None:
    cache = Cache(seed=5)
    layer.attend(cache.rows(0, 300))
    rows = cache.rows(300, 301)
    rows.mask[0, :40] = -np.inf  # a sliding window's
    found, num_read = layer.attend(rows)
    assert num_read == -1
    assert not found.any()
    # What that pass wrote is grouped again.
    cache.k[:] = Cache(seed=6).k
    found, _ = layer.attend(cache.rows(301, 302))
    with closing(new_layer()) as fresh:
        assert np.array_equal(found, fresh.attend(cache.rows(301, 302))[0])


def test_soft_caps_and_sinks(layer: GroupedLayer) -> None:
    cache = Cache(seed=7)
    sinks = np.linspace(-1, 3, HEADS).astype(np.float32)
    plain = cache.rows(0, 90)
    for inputs in (replace(plain, softcap=5.0), replace(plain, sinks=sinks)):
        found, _ = layer.attend(inputs)
        assert np.abs(found - attend(inputs)).max() <= 1e-6


@pytest.mark.parametrize("count", [0, FIXED, 65, 255])
def test_a_number_of_groups_that_a_page_cannot_have(count: int) -> None:
    with pytest.raises(LowtideError, match="a page cannot have so many groups"):
        GroupedLayer(
            DeltaRowsRule(WINDOW, FIXED), np.array([24, count, 64], np.uint8), SCORE_BIAS, SCALES
        )

"""Every kernel set against numpy in double precision, and against itself in other batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_calls import AttentionInputs, UnsupportedShape, attend, select
from reference import (
    attention,
    attention_weights,
    quantise_q4_0,
    quantise_q8_0,
    tidal_selection,
)

from lowtide.attention.bindings.library import cpu_features, usable_kernel_sets
from lowtide.attention.bindings.structs import SelectionRule
from lowtide.models.errors import LowtideError

SETS = usable_kernel_sets()
FLOATS = {"f16": np.float16, "f32": np.float32}


@dataclass(frozen=True)
class Case:
    rows: int
    heads: int
    kv_heads: int
    size: int
    keys: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.heads}/{self.kv_heads}x{self.size}x{self.keys}"


# Ordered easy to hard: one token, the default model's shape, every head size, odd ratios and lengths.
CASES = [
    Case(1, 1, 1, 16, 1),
    Case(1, 9, 3, 64, 64),
    Case(1, 9, 3, 64, 1100),
    Case(4, 8, 8, 80, 77),
    Case(8, 8, 2, 96, 513),
    Case(9, 8, 1, 128, 512),
    Case(1, 4, 1, 256, 1500),
    Case(32, 32, 8, 64, 700),
    Case(33, 7, 7, 64, 65),
    Case(130, 9, 3, 64, 600),
]


@dataclass(frozen=True)
class Inputs:
    q: Any
    k: Any
    v: Any
    mask: Any
    k_meant: Any
    v_meant: Any
    kv_type: str

    def arrays(self, rows: slice = slice(None), **options: Any) -> AttentionInputs:
        size = self.v_meant.shape[2]
        return AttentionInputs(
            q=self.q[rows],
            k=self.k,
            v=self.v,
            mask=self.mask[rows],
            value_dim=size,
            scale=size**-0.5,
            kv_type=self.kv_type,
            **options,
        )

    def run(
        self,
        *,
        rows: slice = slice(None),
        threads: int = 1,
        kernels: str | None = None,
        slots: Any = None,
        **options: Any,
    ) -> Any:
        arrays = self.arrays(rows, **options)
        return attend(arrays, threads=threads, kernels=kernels, slots=slots)

    def expected(self, slots: Any = None, **options: Any) -> Any:
        some = slice(None) if slots is None else slots
        k, v, mask = self.k_meant[some], self.v_meant[some], self.mask[:, some]
        return attention(self.q, k, v, mask, scale=self.v_meant.shape[2] ** -0.5, **options)


def inputs_of(case: Case, kv_type: str = "f16", seed: int = 0, hidden: float = 0.3) -> Inputs:
    random = np.random.default_rng(seed)
    q = random.standard_normal((case.rows, case.heads, case.size), dtype=np.float32) * 2
    shape = (case.keys, case.kv_heads, case.size)
    stored, meant = [], []
    for _ in range(2):
        values = random.standard_normal(shape, dtype=np.float32)
        if kv_type in FLOATS:
            stored.append(values.astype(FLOATS[kv_type]))
            meant.append(stored[-1].astype(np.float64))
        else:
            packed, means = (quantise_q8_0 if kv_type == "q8_0" else quantise_q4_0)(values)
            stored.append(packed)
            meant.append(means)
    mask = np.where(random.random((case.rows, case.keys)) < hidden, -np.inf, 0).astype(np.float16)
    return Inputs(q, stored[0], stored[1], mask, meant[0], meant[1], kv_type)


POLICIES = ["dense", "tidal"]


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_against_the_reference(policy: str, case: Case, kv_type: str, kernels: str) -> None:
    if kv_type not in FLOATS and case.size % 32:
        pytest.skip("blocks of 32 do not divide this head size: llama.cpp makes no such cache")
    inputs = inputs_of(case, kv_type)
    slots = None
    if policy == "tidal":  # about a third of the slots, in gaps of every kind
        picked = np.random.default_rng(3).random(case.keys) < 0.3
        slots = np.flatnonzero(picked | (np.arange(case.keys) == 0)).astype(np.int32)
    expected = inputs.expected(slots)
    found = inputs.run(kernels=kernels, threads=2, slots=slots)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("num_keys", [80, 200, 333])
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[6], Case(4, 9, 3, 64, 900)], ids=str)
def test_a_selection_layer_chooses_what_the_reference_does(
    case: Case, num_keys: int, kernels: str
) -> None:
    inputs = inputs_of(case)
    rule = SelectionRule(num_keys, 0.0, 4, 16, 0)
    scored = slice(max(case.rows - 4, 0), None)  # the last rows choose for all
    weights = attention_weights(
        inputs.q[scored], inputs.k_meant, inputs.mask[scored], scale=case.size**-0.5
    )
    whole = np.zeros((case.rows, case.heads, case.keys))
    whole[scored] = weights
    expected = tidal_selection(whole, inputs.mask, num_keys=num_keys, num_first=4, num_last=16)
    found = select(inputs.arrays(), rule, kernels=kernels)
    assert found is not None and expected is not None
    assert len(found) == len(expected) and (np.diff(found) > 0).all()
    different = set(found.tolist()) ^ set(expected.tolist())
    totals = whole.sum(axis=(0, 1))
    least = totals[expected].min() if not different else totals[sorted(different)]
    assert (
        np.ptp(least) <= 1e-6 * totals.max()
    )  # only keys of all but equal weight may change places
    for threads in (2, 5):
        again = select(inputs.arrays(), rule, kernels=kernels, threads=threads)
        assert again is not None and again.tolist() == found.tolist()


@pytest.mark.parametrize("kernels", SETS)
def test_a_budget_of_every_visible_key_is_dense_bit_for_bit(kernels: str) -> None:
    inputs = inputs_of(Case(1, 9, 3, 64, 700))
    visible = np.flatnonzero(~np.isneginf(inputs.mask[0])).astype(np.int32)
    assert select(inputs.arrays(), SelectionRule(len(visible), 0.0, 4, 64, 0)) is None
    assert select(inputs.arrays(), SelectionRule(0, 1.0, 4, 64, 0)) is None
    assert select(inputs.arrays(), SelectionRule(64, 0.0, 4, 16, 700)) is None  # a minimum context
    everything = np.arange(700, dtype=np.int32)
    dense = inputs.run(kernels=kernels)
    assert dense.tobytes() == inputs.run(kernels=kernels, slots=everything).tobytes()


@pytest.mark.parametrize("kernels", SETS)
def test_first_and_last_keys_are_selected_and_hidden_ones_never(kernels: str) -> None:
    inputs = inputs_of(Case(2, 4, 2, 64, 600))
    inputs.k[:4] = 0
    found = select(inputs.arrays(), SelectionRule(0, 0.25, 3, 20, 0), kernels=kernels)
    assert found is not None
    selected = set(found.tolist())
    for row in ~np.isneginf(inputs.mask):
        seen = np.flatnonzero(row).tolist()
        assert selected >= {*seen[:3], *seen[-20:]}
    visible = (~np.isneginf(inputs.mask)).any(axis=0)
    assert visible[found].all()
    assert len(found) == np.ceil(0.25 * visible.sum())


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[9]], ids=str)
def test_attention_sinks(case: Case, kernels: str) -> None:
    inputs = inputs_of(case)
    sinks = np.linspace(-2, 4, case.heads, dtype=np.float32)
    inputs.mask[case.rows - 1, 1:] = -np.inf  # a row of one key, which a sink outweighs
    found = inputs.run(kernels=kernels, threads=2, sinks=sinks)
    np.testing.assert_allclose(found, inputs.expected(sinks=sinks), rtol=2e-5, atol=1e-5)
    assert np.abs(found - inputs.run(kernels=kernels)).max() > 1e-2


@pytest.mark.parametrize("kernels", SETS)
def test_a_soft_cap(kernels: str) -> None:
    inputs = inputs_of(CASES[2])
    found = inputs.run(kernels=kernels, softcap=3.0)
    np.testing.assert_allclose(found, inputs.expected(softcap=3.0), rtol=2e-5, atol=1e-5)
    assert np.abs(found - inputs.run(kernels=kernels)).max() > 1e-3


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[7], CASES[9]], ids=str)
def test_a_token_is_the_same_in_any_batch_and_with_any_threads(case: Case, kernels: str) -> None:
    inputs = inputs_of(case)
    whole = inputs.run(kernels=kernels, threads=1)
    for threads in (2, 3, 8):
        assert whole.tobytes() == inputs.run(kernels=kernels, threads=threads).tobytes()
    for rows in (slice(0, 1), slice(case.rows - 1, None), slice(0, 7), slice(0, 20)):
        part = inputs.run(kernels=kernels, rows=rows, threads=2)
        assert part.tobytes() == whole[rows].tobytes()


@pytest.mark.parametrize("kernels", SETS)
def test_more_hidden_keys_at_the_end_change_nothing(kernels: str) -> None:
    """llama.cpp pads the cache's view to a multiple of 256: the padding depends on the batch."""
    inputs = inputs_of(Case(3, 9, 3, 64, 700))
    whole = inputs.run(kernels=kernels)
    inputs.mask[:, 500:] = -np.inf
    padded = inputs.run(kernels=kernels)
    arrays = inputs.arrays()
    mask = np.ascontiguousarray(arrays.mask[:, :500])
    shorter = attend(
        replace(arrays, k=arrays.k[:500], v=arrays.v[:500], mask=mask), kernels=kernels
    )
    assert padded.tobytes() == shorter.tobytes() != whole.tobytes()


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_in_hidden_keys_and_other_heads_stay_there(poison: float, kernels: str) -> None:
    inputs = inputs_of(Case(2, 4, 2, 64, 300))
    clean = inputs.run(kernels=kernels)
    hidden = np.isneginf(inputs.mask).all(axis=0)
    assert hidden.any()
    inputs.k[hidden] = poison
    inputs.v[hidden] = poison
    assert inputs.run(kernels=kernels).tobytes() == clean.tobytes()
    inputs.k[5, 1] = poison  # the second KV head, a key that rows see
    inputs.v[6, 1] = poison
    assert inputs.run(kernels=kernels)[:, :2].tobytes() == clean[:, :2].tobytes()


@pytest.mark.parametrize("kernels", SETS)
def test_a_query_that_sees_no_key_is_zero(kernels: str) -> None:
    inputs = inputs_of(Case(12, 2, 1, 64, 130))
    inputs.mask[3] = -np.inf
    found = inputs.run(kernels=kernels, threads=2)
    assert not found[3].any() and np.isfinite(found).all()
    np.testing.assert_allclose(found, inputs.expected(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", SETS)
def test_scores_of_any_size(kernels: str) -> None:
    inputs = inputs_of(Case(2, 2, 1, 64, 200))
    inputs.q[:] *= 1000  # weights underflow but for one key
    np.testing.assert_allclose(inputs.run(kernels=kernels), inputs.expected(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kernels", SETS)
def test_strided_views_of_a_larger_cache(kernels: str) -> None:
    inputs = inputs_of(Case(2, 4, 2, 64, 150))
    cache = np.full((2, 2, 300, 64), np.nan, np.float16)  # k or v, head, cell, channel
    cache[0, :, :150], cache[1, :, :150] = inputs.k.swapaxes(0, 1), inputs.v.swapaxes(0, 1)
    k, v = (cache[i, :, :150].swapaxes(0, 1) for i in range(2))
    found = attend(replace(inputs.arrays(), k=k, v=v), kernels=kernels)
    assert found.tobytes() == inputs.run(kernels=kernels).tobytes()


@given(
    rows=st.integers(1, 40),
    group=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    size=st.sampled_from([16, 32, 64, 80, 112, 256]),
    keys=st.integers(1, 1200),
    hidden=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    rows: int, group: int, kv_heads: int, size: int, keys: int, hidden: float, seed: int
) -> None:
    case = Case(rows, group * kv_heads, kv_heads, size, keys)
    inputs = inputs_of(case, seed=seed, hidden=hidden)
    expected = inputs.expected()
    for kernels in SETS:
        found = inputs.run(kernels=kernels, threads=1 + seed % 3)
        np.testing.assert_allclose(found, expected, rtol=5e-5, atol=2e-5)


@pytest.mark.parametrize(
    "case", [Case(1, 3, 2, 64, 5), Case(1, 1, 1, 272, 5), Case(1, 1, 1, 24, 5)], ids=str
)
def test_an_unsupported_shape_is_refused(case: Case) -> None:
    with pytest.raises(UnsupportedShape):
        inputs_of(case).run()


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(LowtideError, match="have no cray kernels"):
        inputs_of(CASES[0]).run(kernels="cray")


ROUNDED = "avx512_bf16" in cpu_features() and "avx512" in SETS


@pytest.mark.skipif(not ROUNDED, reason="this processor has no avx512_bf16")
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize(
    "case",
    [Case(33, 2, 2, 64, 300), CASES[9], Case(40, 4, 1, 256, 333), Case(65, 8, 4, 96, 700)],
    ids=str,
)
def test_prompts_in_bfloat16_are_rounded_only(case: Case, kv_type: str) -> None:
    inputs = inputs_of(case, kv_type)
    inputs.mask[:, : case.keys // 2] = 0  # blocks that every row sees, and ragged ones
    exact, use_bf16 = inputs.run(kernels="avx512"), inputs.run(kernels="avx512", use_bf16=True)
    scale = np.abs(exact).max()
    assert 1e-4 < np.abs(use_bf16 - exact).max() / scale < 0.05
    assert np.sqrt(((use_bf16 - exact) ** 2).mean() / (exact**2).mean()) < 0.01
    for threads in (2, 3, 8):
        again = inputs.run(kernels="avx512", use_bf16=True, threads=threads)
        assert again.tobytes() == use_bf16.tobytes()


@pytest.mark.skipif(not ROUNDED, reason="this processor has no avx512_bf16")
def test_only_prompts_are_rounded_and_hidden_keys_stay_hidden() -> None:
    few = inputs_of(Case(32, 9, 3, 64, 300))
    assert few.run(kernels="avx512", use_bf16=True).tobytes() == few.run(kernels="avx512").tobytes()
    many = inputs_of(Case(48, 9, 3, 64, 300))
    many.mask[:, 7] = -np.inf
    clean = many.run(kernels="avx512", use_bf16=True)
    many.k[7], many.v[7] = np.nan, np.inf
    assert many.run(kernels="avx512", use_bf16=True).tobytes() == clean.tobytes()
    assert (
        many.run(kernels=SETS[-1], use_bf16=True).tobytes() == many.run(kernels=SETS[-1]).tobytes()
    )

"""The mask of a constraint, applied to logits: the native functions against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.attention.bindings.legal_tokens import best_legal, legal_ids

SIZES = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 640, 1000]))


@given(
    SIZES, st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]), st.integers(0, 10_000), st.integers(0, 9)
)
def test_they_agree_with_numpy(size: int, share: float, seed: int, num_extra: int) -> None:
    random = np.random.default_rng(seed)
    is_legal = random.random(size) < share
    mask = np.packbits(is_legal, bitorder="little").tobytes() + b"\xff" * num_extra
    logits = random.integers(-4, 5, size).astype(np.float32)  # many are equal
    expected = np.flatnonzero(is_legal)
    assert legal_ids(mask, size).tolist() == expected.tolist()
    best = best_legal(logits, mask)
    assert best == (int(expected[logits[expected].argmax()]) if len(expected) else None)


@pytest.mark.parametrize("num_bytes", range(12))
def test_a_short_mask_allows_nothing_behind_it(num_bytes: int) -> None:
    logits = np.arange(200, dtype=np.float32)
    assert legal_ids(b"\xff" * num_bytes, 200).tolist() == list(range(8 * num_bytes))
    assert best_legal(logits, b"\xff" * num_bytes) == (8 * num_bytes - 1 if num_bytes else None)


def test_logits_of_minus_infinity_are_legal_all_the_same() -> None:
    logits = np.full(100, -np.inf, np.float32)
    assert best_legal(logits, bytes(8) + b"\x10") == 68
    assert best_legal(logits[::2], b"\xff" * 13) == 0  # not contiguous

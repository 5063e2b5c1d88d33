"""The ledger never reserves more than the budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.memory.budget import Ledger
from lowtide.memory.units import OverBudget

ACTIONS = st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 120)), max_size=40)


@given(ACTIONS)
def test_the_sum_never_exceeds_the_budget(actions: list[tuple[str, int | None]]) -> None:
    ledger = Ledger(200)
    expected: dict[str, int] = {}
    for component, num_bytes in actions:
        if num_bytes is None:
            ledger.release(component)
            expected.pop(component, None)
            continue
        fits = sum(expected.values()) - expected.get(component, 0) + num_bytes <= 200
        if fits:
            ledger.reserve(component, num_bytes)
            expected[component] = num_bytes
        else:
            with pytest.raises(OverBudget):
                ledger.reserve(component, num_bytes)
        assert ledger.components == expected
        assert ledger.reserved_bytes == sum(expected.values()) <= 200


def test_the_error_has_the_request_the_limit_and_a_hint() -> None:
    ledger = Ledger(100 << 20)
    ledger.reserve("weights", 80 << 20)
    with pytest.raises(OverBudget) as caught:
        ledger.reserve("KV cache", 50 << 20)
    assert (caught.value.needed_bytes, caught.value.budget_bytes) == (130 << 20, 100 << 20)
    assert str(caught.value) == (
        "KV cache, with the memory reserved before it, needs at least 130 MiB, but the limit is 100.0 MiB: "
        "raise memory or ask for less"
    )


def test_a_negative_size_is_a_bug() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        Ledger(1).reserve("a", -1)

from __future__ import annotations

import pytest

from lowtide.memory.budget import Ledger
from lowtide.memory.plan.kv_reservation import KVReservation
from lowtide.memory.plan.line import CACHE
from lowtide.memory.units import OverBudget


def test_the_cache_grows_while_the_ledger_has_room() -> None:
    ledger = Ledger(1000)
    ledger.reserve("weights", 600)
    ledger.reserve(CACHE, 100)
    growth = KVReservation(ledger, 10, lambda tokens: 10 * tokens)
    growth.admit(7)
    assert ledger.components[CACHE] == 100  # what was planned stays
    growth.admit(25)
    assert ledger.components[CACHE] == 250
    with pytest.raises(OverBudget, match="KV cache.*raise --memory"):
        growth.admit(41)
    assert ledger.components[CACHE] == 250
    growth.admit(40)
    growth.admit(3)
    assert ledger.components[CACHE] == 100


def test_another_owner_may_have_taken_the_room() -> None:
    ledger = Ledger(1000)
    ledger.reserve(CACHE, 100)
    growth = KVReservation(ledger, 10, lambda tokens: 10 * tokens)
    ledger.reserve("session", 850)
    with pytest.raises(OverBudget):
        growth.admit(20)
    ledger.release("session")
    growth.admit(20)

"""A KV cache that grows beyond its plan reserves its bytes in the ledger."""

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
    reservation = KVReservation(ledger, 10, lambda tokens: 10 * tokens)
    reservation.admit(7)
    assert ledger.components[CACHE] == 100  # the planned size stays reserved
    reservation.admit(25)
    assert ledger.components[CACHE] == 250
    with pytest.raises(OverBudget, match="KV cache.*raise memory"):
        reservation.admit(41)
    assert ledger.components[CACHE] == 250
    reservation.admit(40)
    reservation.admit(3)
    assert ledger.components[CACHE] == 100


def test_another_component_may_use_the_room() -> None:
    ledger = Ledger(1000)
    ledger.reserve(CACHE, 100)
    reservation = KVReservation(ledger, 10, lambda tokens: 10 * tokens)
    ledger.reserve("session", 850)
    with pytest.raises(OverBudget):
        reservation.admit(20)
    ledger.release("session")
    reservation.admit(20)

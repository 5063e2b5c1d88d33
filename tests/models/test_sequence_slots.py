"""Slots of sequences: the lowest free one is taken, and a shared one is free when nobody holds it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.models.sequence_slots import FreeSlots, SlotTable


@given(steps=st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=60))
def test_the_lowest_free_slot_is_allocated_and_none_twice(steps: list[int | None]) -> None:
    slots, free, allocated = FreeSlots(20), set(range(20)), list[int]()
    for step in steps:
        if step is None and free:
            lowest = min(free)
            assert slots.take() == lowest
            free.remove(lowest)
            allocated.append(lowest)
        elif step is not None and allocated:
            freed = [allocated.pop(step % len(allocated))]
            slots.free(freed)
            free.update(freed)
        assert len(slots) == len(free)


def test_a_full_cache_has_no_free_slot() -> None:
    slots = FreeSlots(1)
    assert slots.take() == 0
    with pytest.raises(IndexError, match="no slot is free"):
        slots.take()


STEPS = st.tuples(
    st.sampled_from("append copy truncate".split()), st.integers(0, 3), st.integers(0, 9)
)


@given(steps=st.lists(STEPS, max_size=60))
def test_sequences_hold_what_they_were_given_and_the_rest_is_free(
    steps: list[tuple[str, int, int]],
) -> None:
    """Against lists: `append`, `copy_prefix` to an empty sequence, and `truncate`, at random."""
    table, held = SlotTable(4, 24), [list[int]() for _ in range(4)]
    for step, sequence, number in steps:
        used = {slot for slots in held for slot in slots}
        if step == "append" and number <= 24 - len(used):
            table.append(sequence, number)
            held[sequence] += sorted(set(range(24)) - used)[:number]
        elif step == "copy" and not held[target := (sequence + 1) % 4]:
            table.copy_prefix(sequence, target, min(number, len(held[sequence])))
            held[target] = held[sequence][:number]
        elif step == "truncate":
            table.truncate(sequence, number)
            del held[sequence][number:]
        assert [list(table.slots(i)) for i in range(4)] == held
        assert table.num_free == 24 - len({slot for slots in held for slot in slots})
        assert table.num_held((0, 1), 2, 3) == len({*held[0], *held[1], *held[2][:3]})

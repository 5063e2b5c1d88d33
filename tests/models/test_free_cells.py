"""Which cells are handed out: always the lowest ones that are free."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.models.gguf.sequences import FreeSlots


@given(steps=st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=60))
def test_the_lowest_free_cell_is_taken_and_none_twice(steps: list[int | None]) -> None:
    cells, free, held = FreeSlots(20), set(range(20)), list[int]()
    for step in steps:
        if step is None and free:
            lowest = min(free)
            assert cells.take() == lowest
            free.remove(lowest)
            held.append(lowest)
        elif step is not None and held:
            given_back = [held.pop(step % len(held))]
            cells.release_pages(given_back)
            free.update(given_back)
        assert len(cells) == len(free)


def test_a_full_cache_has_none() -> None:
    cells = FreeSlots(1)
    assert cells.take() == 0
    with pytest.raises(IndexError, match="no cell is free"):
        cells.take()

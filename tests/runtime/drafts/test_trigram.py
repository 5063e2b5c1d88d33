"""The adaptive table: what it learns, what it forgets, and that it never grows."""

from __future__ import annotations

import random
import sys

from hypothesis import given
from hypothesis import strategies as st

from lowtide.runtime.speculation.drafts import (
    MOST_WEIGHT,
    NUM_FOLLOWERS,
    TABLE_BYTES,
    Proposal,
    TrigramDraft,
)


def taught(*texts: list[int]) -> TrigramDraft:
    draft = TrigramDraft()
    for text in texts:
        draft.follow(text)
    return draft


def test_what_was_seen_is_proposed_and_in_other_texts_too() -> None:
    draft = taught([1, 2, 3, 4, 5, 6], [9, 1, 2])
    assert draft.propose(3).token_ids == (3, 4, 5)
    assert draft.propose(1).token_ids == (3,)
    draft.follow([7, 7])
    assert draft.propose(3) == Proposal()


def test_the_likelier_follower_is_proposed_and_seen_often_it_is_surer() -> None:
    often = taught([1, 2, 3], [1, 2, 4], [1, 2], [1, 2, 4], [1, 2], [1, 2, 4], [8, 1, 2])
    assert often.propose(1).token_ids == (4,)
    once = taught([1, 2, 4], [8, 1, 2])
    always = taught([1, 2, 4], [1, 2], [1, 2, 4], [8, 1, 2])
    assert once.propose(1).confidence < always.propose(1).confidence < TrigramDraft.num_classes
    assert often.propose(1).confidence < always.propose(1).confidence


def test_an_old_habit_gives_way_to_a_new_one() -> None:
    draft = taught(*([1, 2, token] for _ in range(2 * MOST_WEIGHT) for token in (3, 0)))
    for _ in range(3 * MOST_WEIGHT):
        draft.follow([1, 2, 5])
        draft.follow([1, 2])
    assert draft.propose(1).token_ids == (5,)


@given(st.lists(st.integers(0, 5), max_size=80), st.integers(0, 8))
def test_chains_are_of_tokens_that_were_seen_and_not_longer_than_wanted(
    text: list[int], num_tokens: int
) -> None:
    chain = taught(text).propose(num_tokens).token_ids
    assert len(chain) <= num_tokens and set(chain) <= set(text)


def test_it_has_room_for_so_many_and_no_more() -> None:
    draft = TrigramDraft()
    arrays = (draft._keys, draft._followers, draft._weights)
    before = sum(sys.getsizeof(table) for table in arrays)
    random.seed(1)
    for _ in range(40):
        draft.follow([random.randrange(50_000) for _ in range(1_000)])
    assert sum(sys.getsizeof(table) for table in arrays) == before
    assert before <= TABLE_BYTES + 3 * 200
    assert len(draft._followers) == NUM_FOLLOWERS * len(draft._keys)

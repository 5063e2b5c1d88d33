"""The trigram table: what it learns, what it forgets, and that it never grows."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from lookup_reference import MAX_WEIGHT, TrigramReference

from lowtide.runtime.speculation.drafts import Proposal, TrigramDraft
from lowtide.runtime.speculation.options import TABLES


def trained(*texts: list[int]) -> TrigramDraft:
    draft = TrigramDraft()
    for text in texts:
        draft.follow(text)
    return draft


def test_what_was_learned_is_proposed_in_other_texts_too() -> None:
    draft = trained([1, 2, 3, 4, 5, 6], [9, 1, 2])
    assert draft.propose(3).token_ids == (3, 4, 5)
    assert draft.propose(1).token_ids == (3,)
    draft.follow([7, 7])
    assert draft.propose(3) == Proposal()


def test_the_most_frequent_follower_is_proposed_and_frequency_raises_confidence() -> None:
    often = trained([1, 2, 3], [1, 2, 4], [1, 2], [1, 2, 4], [1, 2], [1, 2, 4], [8, 1, 2])
    assert often.propose(1).token_ids == (4,)
    once = trained([1, 2, 4], [8, 1, 2])
    always = trained([1, 2, 4], [1, 2], [1, 2, 4], [8, 1, 2])
    assert once.propose(1).confidence < always.propose(1).confidence < TrigramDraft.num_classes
    assert often.propose(1).confidence < always.propose(1).confidence


def test_new_followers_replace_old_ones() -> None:
    draft = trained(*([1, 2, token] for _ in range(2 * MAX_WEIGHT) for token in (3, 0)))
    for _ in range(3 * MAX_WEIGHT):
        draft.follow([1, 2, 5])
        draft.follow([1, 2])
    assert draft.propose(1).token_ids == (5,)


@given(st.lists(st.integers(0, 5), max_size=80), st.integers(0, 8))
def test_chains_have_seen_tokens_and_at_most_the_requested_length(
    text: list[int], num_tokens: int
) -> None:
    chain = trained(text).propose(num_tokens).token_ids
    assert len(chain) <= num_tokens and set(chain) <= set(text)


def test_its_size_is_fixed_but_for_the_text() -> None:
    draft = TrigramDraft()
    before = draft.num_bytes
    random.seed(1)
    for _ in range(40):
        draft.follow([random.randrange(50_000) for _ in range(1_000)])
    assert draft.num_bytes <= before + 5 * 1_000
    assert draft.num_bytes <= TABLES["trigram"].table_bytes


@given(st.lists(st.lists(st.integers(0, 4), max_size=60), max_size=6), st.integers(0, 9))
def test_the_native_table_equals_the_reference(history: list[list[int]], num_tokens: int) -> None:
    native, reference = TrigramDraft(), TrigramReference()
    for text in history:
        for end in {len(text) // 2, len(text)}:
            native.follow(text[:end])
            reference.follow(text[:end])
            assert native.propose(num_tokens) == reference.propose(num_tokens)


def test_pairs_that_share_a_slot_replace_each_other_as_in_the_reference() -> None:
    chance = random.Random(2)
    native, reference = TrigramDraft(), TrigramReference()
    for _ in range(30):
        text = [chance.randrange(1 << 17) for _ in range(40)] * 60
        native.follow(text)
        reference.follow(text)
        assert native.propose(5) == reference.propose(5)

"""Prompt lookup: long matches first, the most recent of equals, and the text taken back from its end."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lowtide.runtime.speculation.drafts import (
    CLASSES,
    LEAST_MATCH,
    MOST_MATCH,
    NgramDraft,
    Proposal,
)

texts = st.lists(st.integers(0, 3), max_size=60)


def proposed(text: Sequence[int], num_tokens: int) -> Proposal:
    draft = NgramDraft()
    draft.follow(text)
    return draft.propose(num_tokens)


def searched(text: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """The same by trying every earlier place."""
    last = len(text) - 1

    def length(place: int) -> int:
        most = min(MOST_MATCH, place + 1)
        return next((n for n in range(most) if text[place - n] != text[last - n]), most)

    places = [place for place in range(last) if length(place) >= LEAST_MATCH]
    if not places:
        return ()
    best = max(places, key=lambda place: (length(place), place))
    copied = list(text)
    while len(copied) < len(text) + num_tokens:
        copied.append(copied[best + 1 + len(copied) - len(text)])
    return tuple(copied[len(text) :])


@given(texts, st.integers(1, 9))
def test_it_finds_what_a_search_of_every_place_finds(text: list[int], num_tokens: int) -> None:
    assert proposed(text, num_tokens).token_ids == searched(text, num_tokens)


@given(texts, texts, st.integers(1, 5))
def test_a_text_that_was_followed_before_leaves_nothing_behind(
    before: list[int], text: list[int], num_tokens: int
) -> None:
    draft = NgramDraft()
    draft.follow(before)
    draft.follow(text)
    assert draft.propose(num_tokens) == proposed(text, num_tokens)


def test_a_longer_match_is_surer() -> None:
    text = list(range(100, 130))
    surenesses = [proposed([*text, 0, *text[-n - 3 : -3]], 2).confidence for n in (3, 4, 8, 25)]
    assert surenesses == sorted(surenesses) and surenesses[0] == 0
    assert surenesses[-1] == len(CLASSES) < NgramDraft.num_classes
    priors = [NgramDraft().prior(confidence) for confidence in range(NgramDraft.num_classes)]
    assert priors == sorted(priors) and 0 < priors[0] < priors[-1] < 1


def test_nothing_that_came_before_is_nothing_proposed() -> None:
    assert proposed([], 4) == proposed([1, 2, 3], 4) == proposed(range(50), 4) == Proposal()
    assert proposed([1, 2, 3, 1, 2, 3], 0) == Proposal()

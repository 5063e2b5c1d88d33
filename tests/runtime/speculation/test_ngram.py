"""Prompt lookup: the longest match, the most recent of equals, and texts that get shorter."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from lookup_reference import MAX_MATCH, MIN_MATCH, NgramReference

from lowtide.runtime.speculation.drafts import CLASSES, NgramDraft, Proposal

texts = st.lists(st.integers(0, 3), max_size=60)


def proposed(text: Sequence[int], num_tokens: int) -> Proposal:
    draft = NgramDraft()
    draft.follow(text)
    return draft.propose(num_tokens)


def searched(text: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """Return the same by comparing every earlier position."""
    last = len(text) - 1

    def length(position: int) -> int:
        most = min(MAX_MATCH, position + 1)
        return next((n for n in range(most) if text[position - n] != text[last - n]), most)

    positions = [position for position in range(last) if length(position) >= MIN_MATCH]
    if not positions:
        return ()
    best = max(positions, key=lambda position: (length(position), position))
    following = list(text)
    while len(following) < len(text) + num_tokens:
        following.append(following[best + 1 + len(following) - len(text)])
    return tuple(following[len(text) :])


@given(texts, st.integers(1, 9))
def test_it_finds_what_a_search_of_every_position_finds(text: list[int], num_tokens: int) -> None:
    assert proposed(text, num_tokens).token_ids == searched(text, num_tokens)


@given(texts, texts, st.integers(1, 5))
def test_an_earlier_text_leaves_no_trace(
    before: list[int], text: list[int], num_tokens: int
) -> None:
    draft = NgramDraft()
    draft.follow(before)
    draft.follow(text)
    assert draft.propose(num_tokens) == proposed(text, num_tokens)


def test_a_longer_match_has_a_higher_confidence() -> None:
    text = list(range(100, 130))
    confidences = [proposed([*text, 0, *text[-n - 3 : -3]], 2).confidence for n in (3, 4, 8, 25)]
    assert confidences == sorted(confidences) and confidences[0] == 0
    assert confidences[-1] == len(CLASSES) < NgramDraft.num_classes
    priors = [NgramDraft().prior(confidence) for confidence in range(NgramDraft.num_classes)]
    assert priors == sorted(priors) and 0 < priors[0] < priors[-1] < 1


def test_without_a_match_nothing_is_proposed() -> None:
    assert proposed([], 4) == proposed([1, 2, 3], 4) == proposed(range(50), 4) == Proposal()
    assert proposed([1, 2, 3, 1, 2, 3], 0) == Proposal()


@given(st.lists(texts, max_size=4), st.integers(0, 9))
def test_native_lookup_equals_the_reference(history: list[list[int]], num_tokens: int) -> None:
    native, reference = NgramDraft(), NgramReference()
    for text in history:
        for end in {len(text) // 2, len(text)}:
            native.follow(text[:end])
            reference.follow(text[:end])
            assert native.propose(num_tokens) == reference.propose(num_tokens)


def test_it_holds_eight_bytes_a_token_and_grows_by_an_eighth() -> None:
    draft = NgramDraft()
    empty = draft.num_bytes
    draft.follow(range(100_000))
    assert 8 * 100_000 <= draft.num_bytes - empty <= 9.1 * 100_000
    draft.close()
    draft.close()

"""Prompts of one owner find nothing of what prompts of another one left."""

from __future__ import annotations

from typing import Any

import pytest

from lowtide import FakeModel, Runtime
from lowtide.models.text.prompt_span import PromptSpan
from lowtide.runtime.generation.turns import LastTurn, RecentTurns
from lowtide.runtime.kv.batch import BatchKV
from lowtide.runtime.kv.session import KVSession

PROMPT = list(range(1, 81))


def read(cache: BatchKV | KVSession, sequence: int, owner: str) -> int:
    """Compute the prompt for an owner; return how many of its tokens were there."""
    from lowtide.models.model import SequenceSlice

    num_cached = cache.add(sequence, PROMPT, 100, owner).num_cached
    cache.compute([SequenceSlice(sequence, PROMPT[num_cached:], 1)], [])
    return num_cached


def batch() -> BatchKV:
    return BatchKV(FakeModel(context=512, batch_size=512).open_sequences(4, 512), 4)


def test_a_batch_copies_prefixes_of_the_same_owner_alone() -> None:
    cache = batch()
    assert read(cache, 0, "a") == 0  # it runs on
    assert read(cache, 1, "b") == 0
    assert read(cache, 2, "a") == len(PROMPT) - 1
    cache.remove(1)
    assert read(cache, 1, "c") == 0
    assert read(cache, 3, "b") == len(PROMPT) - 1  # the ended one


def test_an_ended_prompt_is_found_by_its_owner_after_another_used_the_batch() -> None:
    cache = batch()
    read(cache, 0, "a")
    cache.remove(0)
    assert read(cache, 0, "b") == 0
    cache.remove(0)
    assert read(cache, 0, "a") == len(PROMPT) - 1


def test_a_prompt_does_not_wait_for_one_of_another_owner() -> None:
    cache = batch()
    cache.add(0, PROMPT, 100, "a")
    assert cache.is_awaited(PROMPT, "a") and not cache.is_awaited(PROMPT, "b")


def test_room_is_counted_without_the_prefix_of_another_owner() -> None:
    cache = BatchKV(FakeModel(context=512, batch_size=512).open_sequences(2, 150), 2)
    read(cache, 0, "a")
    assert cache.can_add(PROMPT, 100, "a")
    assert not cache.can_add(PROMPT, 100, "b")


def test_a_session_is_emptied_for_another_owner() -> None:
    session = KVSession(FakeModel(context=512, batch_size=512))
    assert [read(session, 0, owner) for owner in "aab"] == [0, len(PROMPT) - 1, 0]
    assert read(session, 0, "a") == 0  # and nothing stored it


@pytest.mark.parametrize("options", [{"sequences": 4}, {}, {"prefix_cache": "8MiB"}])
def test_submitted_prompts_of_two_owners_share_nothing(options: dict[str, Any]) -> None:
    text = "The same beginning of both prompts. " * 8
    with Runtime.open(FakeModel(["Hello."], context=2048), memory="8GiB", **options) as runtime:

        def reused(owner: str) -> int:
            return runtime.submit(text, max_tokens=2, owner=owner).result().stats.reused_tokens

        first = [reused(owner) for owner in ("a", "b", "a", "b")]
        assert first[:2] == [0, 0]
        if (
            options
        ):  # without a place for what is replaced, each finds the cache emptied by the other
            assert first[2] > 100 and first[3] > 100
        else:
            assert first[2:] == [0, 0]
        assert reused("b") > 100


@pytest.mark.parametrize("turns", [LastTurn(), RecentTurns(1000)])
def test_a_chat_goes_on_from_turns_of_its_owner(turns: LastTurn | RecentTurns) -> None:
    spans = [PromptSpan("Hi there", from_message=False)]
    turns.remember(LastTurn("Hi", [1, 2], 2, [2], "a"))
    assert turns.find(spans, "Hi there", "a") is not None
    assert turns.find(spans, "Hi there", "b") is None
    assert turns.find(spans, "Hi there") is None

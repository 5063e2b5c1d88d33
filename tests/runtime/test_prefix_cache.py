"""The prefix cache over the fake model: what is kept, what is found, what goes first."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide import FakeModel, GenerationResult, Runtime
from lowtide.memory.budget import Ledger
from lowtide.memory.plan.kv_reservation import KVReservation
from lowtide.memory.plan.line import PREFIXES
from lowtide.memory.units import KIB, MIB, BadSize, OverBudget
from lowtide.models.errors import BadOption, SnapshotError
from lowtide.runtime.kv.prefix_cache import PrefixCache, kept_bytes
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.planning.plan import LoadConfig
from lowtide.runtime.sessions import store as session_store

IDS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
ONE = kept_bytes(40, 4 + 4 * 40)
"""What a fake state of 40 tokens takes."""


def holding(token_ids: list[int]) -> FakeModel:
    model = FakeModel(context=64)
    model.forward(token_ids)
    return model


def keep(cache: PrefixCache, token_ids: list[int], **how: int) -> None:
    cache.keep(holding(token_ids), token_ids, len(token_ids), **how)


def kept(cache: PrefixCache) -> list[list[int]]:
    """The tokens of every state, the least recently used first."""
    return [list(state.token_ids) for state in cache._states]


def prompt(start: int, length: int = 40) -> list[int]:
    return [start + i % 7 for i in range(length)]


@settings(max_examples=200, deadline=None)
@given(st.lists(IDS, min_size=1, max_size=12), st.integers(0, 4 * ONE))
def test_whatever_was_read_before_the_logits_are_those_of_starting_over(
    prompts: list[list[int]], limit_bytes: int
) -> None:
    """And what is kept never passes the limit, nor lacks a token."""
    model, cache = FakeModel(context=64), PrefixCache(limit_bytes)
    session = KVSession(model, prefixes=cache)
    for token_ids in prompts:
        restored = session.restore(token_ids)
        reused = session.truncate_to_prefix(token_ids)
        assert reused < len(token_ids) and session.token_ids == token_ids[:reused]
        assert not restored or reused > 0
        logits = session.append(token_ids[reused:])
        assert logits.tobytes() == FakeModel(context=64).forward(token_ids).tobytes()
        assert model.num_tokens == len(session.token_ids) == len(token_ids)
        session.decode([2])
        assert cache.num_bytes <= limit_bytes
        for state in cache._states:
            assert array("i", bytes(state.state[4:])).tolist() == list(state.token_ids)


def test_the_longest_beginning_is_found_and_of_these_the_shortest_state() -> None:
    cache = PrefixCache(MIB)
    long, other = [*prompt(1, 20), *prompt(9, 20)], [*prompt(1, 20), *prompt(19, 10)]
    for token_ids in (long, other, prompt(30)):
        keep(cache, token_ids)
    for wanted, longer_than, found in (
        (prompt(1, 20), 0, other),
        (prompt(1, 20), 20, None),
        ([*prompt(1, 20), *prompt(9, 5)], 20, long),
        (prompt(50), 0, None),
    ):
        state = cache.find(wanted, longer_than)
        assert (list(state.token_ids) if state else None) == found


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(3 * ONE)
    for start in (1, 11, 21):
        keep(cache, prompt(start))
    assert cache.num_bytes == 3 * ONE
    assert cache.find(prompt(1), 0) is not None
    keep(cache, prompt(11))  # already there: used again, and not copied
    keep(cache, prompt(31))
    assert kept(cache) == [prompt(1), prompt(11), prompt(31)]
    state = cache.find(prompt(1), 0)
    assert state is not None
    cache.keep(holding(prompt(41)), prompt(41), 40, besides=cache._states[0])
    assert kept(cache) == [prompt(11), prompt(1), prompt(41)]  # 31 went: 11 is to be put back


def test_a_state_that_does_not_fit_is_not_kept_and_costs_no_other() -> None:
    cache = PrefixCache(ONE)
    keep(cache, prompt(1))
    model = FakeModel(context=4096, batch_size=4096)
    model.forward(prompt(11, 4000))
    cache.keep(model, prompt(11, 4000), 4000)
    cache.keep(holding(prompt(21)), prompt(21), 40, besides=cache._states[0])
    assert kept(cache) == [prompt(1)]
    nothing = PrefixCache(0)
    keep(nothing, prompt(1))
    assert nothing.find(prompt(1), 0) is None and nothing.num_bytes == 0


def test_what_is_continued_is_replaced_and_small_losses_are_not_kept() -> None:
    cache = PrefixCache(MIB)
    keep(cache, prompt(1, 20))
    keep(cache, prompt(1, 40))
    assert kept(cache) == [prompt(1, 40)]
    keep(cache, prompt(1, 30))
    assert kept(cache) == [prompt(1, 40)]
    keep(cache, [*prompt(1, 38), 90, 91])
    assert len(kept(cache)) == 1
    keep(cache, [*prompt(1, 30), *prompt(90, 10)], num_staying=38)
    assert len(kept(cache)) == 1
    keep(cache, [*prompt(1, 30), *prompt(90, 10)], num_staying=30)
    assert len(kept(cache)) == 2


def test_without_memory_or_where_native_code_fails_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing(FakeModel):
        def copy_kv(self, into: memoryview) -> None:
            raise SnapshotError("no")

    cache, model = PrefixCache(MIB), Failing(context=64)
    model.forward(prompt(1))
    cache.keep(model, prompt(1), 40)
    assert cache.num_bytes == 0

    def none_left(_num_bytes: int) -> None:
        raise MemoryError

    monkeypatch.setattr("lowtide.runtime.kv.prefix_cache.PageBuffer", none_left)
    keep(cache, prompt(1))
    assert cache.num_bytes == 0


def test_a_state_that_cannot_be_put_back_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = FakeModel(context=64), PrefixCache(MIB)
    session = KVSession(model, prefixes=cache)
    for token_ids in (prompt(1), prompt(11)):
        session.restore(token_ids)
        session.truncate_to_prefix(token_ids)
        session.append(token_ids)

    def failing(_state: memoryview, _num_tokens: int) -> None:
        model.truncate(0)
        raise SnapshotError("no")

    with monkeypatch.context() as patch:
        patch.setattr(model, "put_kv", failing)
        assert not session.restore(prompt(1))
    assert session.token_ids == [] and session.truncate_to_prefix(prompt(1)) == 0
    session.append(prompt(1))
    assert session.restore(prompt(11))  # the other one is as it was


def test_a_state_that_the_budget_has_no_room_for_stays_where_it_is() -> None:
    ledger = Ledger(100)
    growth = KVReservation(ledger, 10, lambda num_tokens: num_tokens)
    growth.admit(40)
    session = KVSession(FakeModel(context=64), growth=growth, prefixes=PrefixCache(MIB))
    session.append(prompt(1))
    session.restore(prompt(11, 5))
    session.truncate_to_prefix(prompt(11, 5))
    ledger.reserve("another", 70)
    with pytest.raises(OverBudget):
        session.admit(40)
    assert not session.restore(prompt(1, 20))
    ledger.release("another")
    assert session.restore(prompt(1, 20))


def test_exactness_comes_back_with_the_state() -> None:
    session = KVSession(FakeModel(context=64), prefixes=PrefixCache(MIB))
    session.append(prompt(1, 20))
    session.decode([3])
    session.restore(prompt(11))
    session.truncate_to_prefix(prompt(11))
    session.append(prompt(11))
    assert session.exact_until == 40
    assert session.restore([*prompt(1, 20), 3, 4])
    assert (session.exact_until, len(session.token_ids)) == (20, 21)


# Of a runtime.


def ask(runtime: Runtime, text: str) -> GenerationResult:
    messages = [{"role": "user", "content": text}]
    return GenerationResult.of(runtime.chat(messages, temperature=0))


def opened(prefix_cache: str | int = "1MiB") -> Runtime:
    model = FakeModel(("Hello.",), context=4096)
    return Runtime.open(model, memory="8GiB", prefix_cache=prefix_cache)


FIRST, SECOND = "first " * 20, "second " * 20


def test_going_back_to_a_prompt_reads_one_token_and_says_where_the_rest_came_from() -> None:
    runtime, plain = opened(), opened(0)
    for text in (FIRST, SECOND):
        assert ask(runtime, text).stats.restored_tokens == 0
    again = ask(runtime, FIRST)
    assert again.stats.restored_tokens == again.stats.reused_tokens == again.stats.prompt_tokens - 1
    assert again.stats.to_dict()["restored_tokens"] == again.stats.restored_tokens
    assert again.token_ids == ask(plain, FIRST).token_ids
    stayed = ask(runtime, FIRST)
    assert stayed.stats.restored_tokens == 0 and stayed.stats.reused_tokens > 100
    for text in (FIRST, SECOND, FIRST):
        assert ask(plain, text).stats.restored_tokens == 0


def test_it_is_off_unless_asked_for() -> None:
    runtime = Runtime.open(FakeModel(), memory="8GiB")
    assert PREFIXES not in runtime.ledger.components
    assert all(row.component != PREFIXES for row in runtime.plan.rows)
    assert opened("64KiB").ledger.components[PREFIXES] == 64 * KIB


@pytest.mark.parametrize("level", ["moderate", "complete"])
def test_a_trim_gives_it_back_and_background_does_not(level: str) -> None:
    runtime = opened()
    for text in (FIRST, SECOND):
        ask(runtime, text)
    cache = runtime._loaded.prefixes
    runtime.trim("background")
    assert cache.num_bytes > 0
    runtime.trim(level)
    assert cache.num_bytes == 0 and runtime.ledger.components[PREFIXES] == MIB
    for text, restored in ((FIRST, False), (SECOND, level == "moderate"), (FIRST, True)):
        assert (ask(runtime, text).stats.restored_tokens > 0) is restored


def test_a_trim_inside_an_answer_leaves_it_whole() -> None:
    runtime = opened()
    for text in (FIRST, SECOND):
        ask(runtime, text)
    pieces = runtime.chat([{"role": "user", "content": FIRST}], temperature=0)
    said = next(pieces).text
    runtime.trim("moderate")
    assert said + "".join(piece.text for piece in pieces) == "Hello."


def test_closing_gives_it_back() -> None:
    runtime = opened()
    for text in (FIRST, SECOND):
        ask(runtime, text)
    runtime.close()
    assert runtime._loaded.prefixes.num_bytes == 0


def test_a_cache_in_the_way_of_a_text_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = opened()
    first = ask(runtime, FIRST)
    monkeypatch.setattr(runtime._loaded, "has_room_to_tokenise", lambda *_: False)
    again = ask(runtime, FIRST)
    assert again.stats.restored_tokens == again.stats.prompt_tokens - 1
    assert again.token_ids == first.token_ids


def test_a_session_file_may_take_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = opened()
    for text in (FIRST, SECOND):
        ask(runtime, text)
    free_bytes = runtime.plan.budget.num_bytes - runtime.ledger.reserved_bytes
    idle_bytes = runtime._loaded.idle_bytes(len(runtime._session.token_ids))
    monkeypatch.setattr(
        session_store, "session_bytes", lambda *_: free_bytes + MIB // 2 + idle_bytes
    )
    before = runtime.ledger.components
    assert runtime.session.save(tmp_path / "talk").num_tokens > 0
    assert runtime._loaded.prefixes.num_bytes == 0 and runtime.ledger.components == before
    assert ask(runtime, SECOND).stats.reused_tokens > 100


def test_wrong_sizes_are_a_sentence() -> None:
    for wrong in ("much", "50%", -5, "1 quart", "0MiB", ""):
        with pytest.raises(
            BadSize, match=f"a prefix cache of '{wrong}' cannot be made: write a size"
        ):
            Runtime.open(FakeModel(), prefix_cache=wrong)
    assert LoadConfig(prefix_cache="0").prefix_bytes == LoadConfig().prefix_bytes == 0
    assert LoadConfig(prefix_cache=" 2MiB").prefix_bytes == 2 * MIB


def test_a_model_of_ones_own_that_copies_nothing_is_told() -> None:
    model = FakeModel()
    model.supports_copy = False  # type: ignore[misc]
    with pytest.raises(BadOption, match="of 1.0 MiB is wanted, fake cannot copy its KV cache"):
        Runtime.open(model, memory="8GiB", prefix_cache="1MiB")
    assert Runtime.open(model, memory="8GiB").plan.fits

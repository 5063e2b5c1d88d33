"""The prefix cache over the fake model: what is stored, what is found, what is dropped first."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide import FakeModel, GenerationResult, Runtime
from lowtide.memory.budget import Ledger
from lowtide.memory.plan.kv_reservation import KVReservation
from lowtide.memory.plan.line import PREFIXES
from lowtide.memory.units import KIB, MIB, BadSize, OverBudget
from lowtide.models.errors import BadOption, SnapshotError
from lowtide.runtime.kv.prefix_cache import PrefixCache, cached_bytes
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.planning.plan import LoadConfig
from lowtide.runtime.sessions import store as store_module

IDS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
ONE = cached_bytes(40, 4 + 4 * 40)
"""Bytes of a fake snapshot of 40 tokens."""


def model_with(token_ids: list[int]) -> FakeModel:
    model = FakeModel(context=64)
    model.forward(token_ids)
    return model


def store(cache: PrefixCache, token_ids: list[int], **options: int) -> None:
    cache.store(model_with(token_ids), token_ids, len(token_ids), **options)


def stored(cache: PrefixCache) -> list[list[int]]:
    """Return the tokens of every snapshot, the least recently used first."""
    return [list(prefix.token_ids) for prefix in cache._prefixes]


def prompt(start: int, length: int = 40) -> list[int]:
    return [start + i % 7 for i in range(length)]


@given(st.lists(IDS, min_size=1, max_size=12), st.integers(0, 4 * ONE))
def test_after_any_prompts_the_logits_are_those_of_starting_over(
    prompts: list[list[int]], limit_bytes: int
) -> None:
    """And the snapshots never exceed the limit, nor lack a token."""
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
        session.decode_token(2)
        assert cache.num_bytes <= limit_bytes
        for prefix in cache._prefixes:
            assert array("i", bytes(prefix.snapshot[4:])).tolist() == list(prefix.token_ids)


def test_the_longest_prefix_is_found_and_of_equals_the_shortest_snapshot() -> None:
    cache = PrefixCache(MIB)
    long, other = [*prompt(1, 20), *prompt(9, 20)], [*prompt(1, 20), *prompt(19, 10)]
    for token_ids in (long, other, prompt(30)):
        store(cache, token_ids)
    for token_ids, longer_than, expected in (
        (prompt(1, 20), 0, other),
        (prompt(1, 20), 20, None),
        ([*prompt(1, 20), *prompt(9, 5)], 20, long),
        (prompt(50), 0, None),
    ):
        found = cache.find(token_ids, longer_than)
        assert (list(found.token_ids) if found else None) == expected


def test_the_least_recently_used_snapshot_is_dropped_first() -> None:
    cache = PrefixCache(3 * ONE)
    for start in (1, 11, 21):
        store(cache, prompt(start))
    assert cache.num_bytes == 3 * ONE
    assert cache.find(prompt(1), 0) is not None
    store(cache, prompt(11))  # stored already: marked as used, not copied
    store(cache, prompt(31))
    assert stored(cache) == [prompt(1), prompt(11), prompt(31)]
    assert cache.find(prompt(1), 0) is not None
    cache.store(model_with(prompt(41)), prompt(41), 40, keep=cache._prefixes[0])
    assert stored(cache) == [
        prompt(11),
        prompt(1),
        prompt(41),
    ]  # 31 was dropped: 11 is to be restored


def test_a_snapshot_that_does_not_fit_is_not_stored_and_drops_no_other() -> None:
    cache = PrefixCache(ONE)
    store(cache, prompt(1))
    model = FakeModel(context=4096, batch_size=4096)
    model.forward(prompt(11, 4000))
    cache.store(model, prompt(11, 4000), 4000)
    cache.store(model_with(prompt(21)), prompt(21), 40, keep=cache._prefixes[0])
    assert stored(cache) == [prompt(1)]
    nothing = PrefixCache(0)
    store(nothing, prompt(1))
    assert nothing.find(prompt(1), 0) is None and nothing.num_bytes == 0


def test_a_continuation_replaces_its_prefix_and_small_losses_are_not_stored() -> None:
    cache = PrefixCache(MIB)
    store(cache, prompt(1, 20))
    store(cache, prompt(1, 40))
    assert stored(cache) == [prompt(1, 40)]
    store(cache, prompt(1, 30))
    assert stored(cache) == [prompt(1, 40)]
    store(cache, [*prompt(1, 38), 90, 91])
    assert len(stored(cache)) == 1
    store(cache, [*prompt(1, 30), *prompt(90, 10)], num_staying=38)
    assert len(stored(cache)) == 1
    store(cache, [*prompt(1, 30), *prompt(90, 10)], num_staying=30)
    assert len(stored(cache)) == 2


def test_without_memory_or_where_native_code_fails_nothing_is_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing(FakeModel):
        def copy_kv(self, into: memoryview) -> None:
            raise SnapshotError("no")

    cache, model = PrefixCache(MIB), Failing(context=64)
    model.forward(prompt(1))
    cache.store(model, prompt(1), 40)
    assert cache.num_bytes == 0

    def none_left(_num_bytes: int) -> None:
        raise MemoryError

    monkeypatch.setattr("lowtide.runtime.kv.prefix_cache.PageBuffer", none_left)
    store(cache, prompt(1))
    assert cache.num_bytes == 0


def test_a_snapshot_that_cannot_be_restored_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, cache = FakeModel(context=64), PrefixCache(MIB)
    session = KVSession(model, prefixes=cache)
    for token_ids in (prompt(1), prompt(11)):
        session.restore(token_ids)
        session.truncate_to_prefix(token_ids)
        session.append(token_ids)

    def failing(_snapshot: memoryview, _num_tokens: int) -> None:
        model.truncate(0)
        raise SnapshotError("no")

    with monkeypatch.context() as patch:
        patch.setattr(model, "put_kv", failing)
        assert not session.restore(prompt(1))
    assert session.token_ids == [] and session.truncate_to_prefix(prompt(1)) == 0
    session.append(prompt(1))
    assert session.restore(prompt(11))  # the other one is unchanged


def test_a_snapshot_that_the_budget_has_no_room_for_stays_stored() -> None:
    ledger = Ledger(100)
    reservation = KVReservation(ledger, 10, lambda num_tokens: num_tokens)
    reservation.admit(40)
    session = KVSession(FakeModel(context=64), reservation=reservation, prefixes=PrefixCache(MIB))
    session.append(prompt(1))
    session.restore(prompt(11, 5))
    session.truncate_to_prefix(prompt(11, 5))
    ledger.reserve("another", 70)
    with pytest.raises(OverBudget):
        session.reserve(40)
    assert not session.restore(prompt(1, 20))
    ledger.release("another")
    assert session.restore(prompt(1, 20))


def test_exact_until_is_restored_with_the_snapshot() -> None:
    session = KVSession(FakeModel(context=64), prefixes=PrefixCache(MIB))
    session.append(prompt(1, 20))
    session.decode_token(3)
    session.restore(prompt(11))
    session.truncate_to_prefix(prompt(11))
    session.append(prompt(11))
    assert session.exact_until == 40
    assert session.restore([*prompt(1, 20), 3, 4])
    assert (session.exact_until, len(session.token_ids)) == (20, 21)


# In a runtime.


def ask(runtime: Runtime, text: str) -> GenerationResult:
    messages = [{"role": "user", "content": text}]
    return GenerationResult.of(runtime.chat(messages, temperature=0))


def open_runtime(prefix_cache: str | int = "1MiB") -> Runtime:
    model = FakeModel(("Hello.",), context=4096)
    return Runtime.open(model, memory="8GiB", prefix_cache=prefix_cache)


FIRST, SECOND = "first " * 20, "second " * 20


def test_returning_to_a_prompt_computes_one_token_and_reports_the_restored_ones() -> None:
    runtime, plain = open_runtime(), open_runtime(0)
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


def test_it_is_off_by_default() -> None:
    runtime = Runtime.open(FakeModel(), memory="8GiB")
    assert PREFIXES not in runtime.ledger.components
    assert all(row.component != PREFIXES for row in runtime.plan.rows)
    assert open_runtime("64KiB").ledger.components[PREFIXES] == 64 * KIB


@pytest.mark.parametrize("level", ["moderate", "complete"])
def test_a_moderate_trim_clears_it_and_a_background_trim_does_not(level: str) -> None:
    runtime = open_runtime()
    for text in (FIRST, SECOND):
        ask(runtime, text)
    cache = runtime._engine.prefixes
    runtime.trim("background")
    assert cache.num_bytes > 0
    runtime.trim(level)
    assert cache.num_bytes == 0 and runtime.ledger.components[PREFIXES] == MIB
    for text, restored in ((FIRST, False), (SECOND, level == "moderate"), (FIRST, True)):
        assert (ask(runtime, text).stats.restored_tokens > 0) is restored


def test_a_trim_during_an_answer_does_not_change_it() -> None:
    runtime = open_runtime()
    for text in (FIRST, SECOND):
        ask(runtime, text)
    chunks = runtime.chat([{"role": "user", "content": FIRST}], temperature=0)
    answer = next(chunks).text
    runtime.trim("moderate")
    assert answer + "".join(chunk.text for chunk in chunks) == "Hello."


def test_closing_clears_it() -> None:
    runtime = open_runtime()
    for text in (FIRST, SECOND):
        ask(runtime, text)
    runtime.close()
    assert runtime._engine.prefixes.num_bytes == 0


def test_a_kv_cache_in_the_way_of_a_text_is_evicted_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = open_runtime()
    first = ask(runtime, FIRST)
    monkeypatch.setattr(runtime._engine, "has_room_to_tokenise", lambda _, cached: cached == 0)
    again = ask(runtime, FIRST)
    assert again.stats.restored_tokens == again.stats.prompt_tokens - 1
    assert again.token_ids == first.token_ids


def test_saving_a_chat_may_use_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = open_runtime()
    for text in (FIRST, SECOND):
        ask(runtime, text)
    free_bytes = runtime.plan.budget.num_bytes - runtime.ledger.reserved_bytes
    idle_bytes = runtime._engine.idle_bytes(len(runtime._session.token_ids))
    monkeypatch.setattr(
        store_module, "session_bytes", lambda *_: free_bytes + MIB // 2 + idle_bytes
    )
    before = runtime.ledger.components
    assert runtime.saved_chats.save(tmp_path / "talk").num_tokens > 0
    assert runtime._engine.prefixes.num_bytes == 0 and runtime.ledger.components == before
    assert ask(runtime, SECOND).stats.reused_tokens > 100


def test_wrong_sizes_are_refused_in_one_sentence() -> None:
    for size in ("much", "50%", -5, "1 quart", "0MiB", ""):
        with pytest.raises(
            BadSize, match=f"prefix_cache is {size!r}, which is not a size: write one"
        ):
            Runtime.open(FakeModel(), prefix_cache=size)
    assert LoadConfig(prefix_cache="0").prefix_bytes == LoadConfig().prefix_bytes == 0
    assert LoadConfig(prefix_cache=" 2MiB").prefix_bytes == 2 * MIB


def test_a_model_without_copies_cannot_have_one() -> None:
    model = FakeModel()
    model.supports_copy = False  # type: ignore[misc]
    with pytest.raises(
        BadOption, match="prefix_cache of 1.0 MiB does not work .* fake cannot copy its KV cache"
    ):
        Runtime.open(model, memory="8GiB", prefix_cache="1MiB")
    assert Runtime.open(model, memory="8GiB").plan.fits

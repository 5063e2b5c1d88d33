"""Batches with drafts against batches without, over the fake model: the same tokens, texts and endings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from batch_drafting import DEAR, FAIR, draft_in_batches, half_knowing, knowing
from hypothesis import given, settings
from hypothesis import strategies as st
from speculating import ToldDraft

from lowtide import FakeModel, GenerationResult, Runtime, SamplingParams
from lowtide.memory.plan.line import BATCH
from lowtide.memory.plan.speculation import CostCurve
from lowtide.models.fake_model import TURN_END
from lowtide.runtime.errors import RuntimeUnusable
from lowtide.runtime.speculation.drafts import NgramDraft

REPLY = "the tide comes in, the tide goes out, the tide comes in again."
TOKENS = (*REPLY.encode(), TURN_END)
PREFIX = "A text that all of them begin with. "
PROMPTS = [PREFIX + end + "\n" for end in ("one", "two, and more of it", "", "three")]


def opened(speculate: str = "auto", context: int = 512, batch_size: int = 64) -> Runtime:
    model = FakeModel([REPLY], context=context, batch_size=batch_size)
    return Runtime.open(model, memory="8GiB", speculate=speculate)


def rows_of(runtime: Runtime) -> list[int]:
    assert isinstance(runtime._model, FakeModel)
    return runtime._model.rows


def told(results: Sequence[GenerationResult]) -> list[tuple[str, list[int], str]]:
    return [(result.text, result.token_ids, result.finish_reason) for result in results]


def ask(runtime: Runtime, **options: Any) -> list[GenerationResult]:
    return runtime.generate_batch(PROMPTS, **{"temperature": 0, **options})


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    lengths=st.lists(st.sampled_from([1, 2, 3, 20, 80, None]), min_size=4, max_size=4),
    stop=st.sampled_from([(), ("goes",), ("tide comes in again",), ("zz",)]),
    temperature=st.sampled_from([0, 0.8, 5.0]),
    penalty=st.sampled_from([1.0, 1.3]),
    context=st.sampled_from([512, 80]),
    batch_size=st.sampled_from([64, 6]),
)
def test_each_answer_is_that_of_its_prompt_alone(
    seed: int,
    lengths: list[int | None],
    stop: tuple[str, ...],
    temperature: float,
    penalty: float,
    context: int,
    batch_size: int,
) -> None:
    options = [
        SamplingParams(
            max_tokens=length,
            stop=stop,
            temperature=temperature,
            repeat_penalty=penalty,
            seed=seed + i,
        )
        for i, length in enumerate(lengths)
    ]
    with (
        opened("off", context) as plain,
        opened("auto", context, batch_size) as drafting,
        pytest.MonkeyPatch.context() as patch,
    ):
        draft_in_batches(patch, lambda i: [half_knowing(TOKENS, seed + i), NgramDraft()])
        alone = [plain.generate(*one) for one in zip(PROMPTS, options, strict=True)]
        together = drafting.generate_batch(PROMPTS, options)
        assert told(together) == told(alone)
        for one, other in zip(alone, together, strict=True):
            assert one.stats.generated_tokens == other.stats.generated_tokens
        assert max(rows_of(drafting)) <= batch_size


def test_drafts_that_know_the_answers_save_passes_for_all_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft_in_batches(monkeypatch, lambda _: [knowing(TOKENS)])
    with opened() as runtime:
        del rows_of(runtime)[:]
        results = ask(runtime)
        passes = rows_of(runtime)[2:]
    assert len(passes) <= -(-len(TOKENS) // 8) + 3
    assert max(passes) == 4 * 8
    for result in results:
        stats = result.stats.speculation
        assert stats is not None and result.text == REPLY
        assert stats["accepted"] >= len(REPLY) - 1 - stats["rounds"]
        assert stats["drafted"] >= stats["accepted"] and stats["mean_accepted"] > 4
        assert max(rows for rows, _ in stats["rows"]) == 8
        assert stats["drafts"] == ["told"] and set(stats["rounds_by_draft"]) == {"told"}
        assert stats["off_reason"] is None and stats["identical"]


def test_each_has_an_acceptance_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of one are right, those of two are wrong, one has none: rows go where they are right."""
    wrong = ToldDraft(lambda _: b"#" * 7)
    drafts = [knowing(TOKENS), wrong, wrong, ToldDraft(lambda _: ())]
    draft_in_batches(monkeypatch, lambda i: [drafts[i]], expected=FAIR)
    with opened() as runtime:
        results = ask(runtime)
    assert [result.text for result in results] == [REPLY] * 4
    right, first, second, silent = (result.stats.speculation for result in results)
    assert right is not None and first is not None and second is not None and silent is not None
    assert right["accepted"] > 40
    assert first["accepted"] == second["accepted"] == 0
    assert first["drafted"] < right["drafted"]
    assert silent["rounds"] == 0 and silent["off_reason"] == "no draft had anything to propose"


def test_a_pass_has_no_more_rows_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_in_batches(monkeypatch, lambda _: [knowing(TOKENS)])
    with opened(batch_size=10) as runtime:
        del rows_of(runtime)[:]
        results = ask(runtime)
        assert max(rows_of(runtime)) == 10
    assert [result.text for result in results] == [REPLY] * 4


def test_our_own_drafts_save_passes_where_a_text_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(["one two three four. " * 8])
    draft_in_batches(monkeypatch, lambda _: [NgramDraft()])
    with Runtime.open(model, memory="8GiB", speculate="ngram") as runtime:
        del model.rows[:]
        results = ask(runtime)
    assert [result.text for result in results] == ["one two three four. " * 8] * 4
    assert len(model.rows) < 0.5 * len(model.replies[0])


def test_drafts_are_loaded_as_the_runtime_was_opened() -> None:
    """Costs are measured in the batch's own sequences, which are empty again before the prompts come."""
    with opened("trigram:rows=4") as runtime:
        results = ask(runtime)
    assert [result.text for result in results] == [REPLY] * 4
    stats = results[0].stats.speculation
    assert stats is not None and stats["drafts"] == ["trigram"]
    assert all(rows <= 4 for rows, _ in stats["rows"])


def test_where_nothing_pays_every_step_is_plain_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft_in_batches(monkeypatch, lambda _: [knowing(TOKENS)], expected=DEAR)
    with opened() as runtime:
        del rows_of(runtime)[:]
        results = ask(runtime)
        assert max(rows_of(runtime)[2:]) == 4
    stats = results[0].stats.speculation
    assert stats is not None and stats["rounds"] == 0
    assert "promised to pay" in stats["off_reason"] and "x a pass" in stats["off_reason"]


def test_verifying_that_loses_time_stops_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are said to be cheap and are not: what they lose is made good by plain passes."""
    steep = CostCurve(num_rows=(1, 4, 5, 64), seconds=(1.0, 1.0, 90.0, 90.0))
    draft_in_batches(monkeypatch, lambda _: [knowing(TOKENS)], cost=steep)
    with opened() as runtime:
        results = ask(runtime)
    stats = results[0].stats.speculation
    assert stats is not None and stats["rounds"] == 1
    assert stats["verifying_s"] == pytest.approx(90.0)
    assert results[0].text == REPLY


@pytest.mark.parametrize(
    "says", [lambda _text: (), lambda _text: 1 / 0, lambda _text: (-5, 1 << 40)]
)
def test_a_draft_with_nothing_garbage_or_an_error_to_say_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, says: Callable[[Sequence[int]], Any]
) -> None:
    draft_in_batches(monkeypatch, lambda _: [ToldDraft(says)])
    with opened() as runtime:
        results = ask(runtime)
    assert [result.text for result in results] == [REPLY] * 4
    assert all(result.stats.speculation["rounds"] == 0 for result in results)  # type: ignore[index]


@pytest.mark.parametrize("taken", [1, 5, 6, 9, 14, 30])
def test_a_batch_that_is_closed_in_the_middle_of_a_run_leaves_the_runtime_usable(
    monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    drafts: list[ToldDraft] = []

    def drafts_of(_: int) -> list[ToldDraft]:
        drafts.append(knowing(TOKENS))
        return drafts[-1:]

    draft_in_batches(monkeypatch, drafts_of)
    with opened() as runtime:
        before = dict(runtime.ledger.components)
        pieces = runtime.stream_batch(PROMPTS, temperature=0)
        texts = [""] * 4
        for _ in range(taken):
            index, piece = next(pieces)
            texts[index] += piece.text
        pieces.close()
        assert all(REPLY.startswith(text) for text in texts)
        assert dict(runtime.ledger.components) == before
        assert len(drafts) == 4 and all(draft.is_closed for draft in drafts)
        assert runtime.generate(PROMPTS[0], temperature=0).text == REPLY
        assert [result.text for result in ask(runtime)] == [REPLY] * 4


def test_another_answer_in_the_middle_of_a_run_ends_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft_in_batches(monkeypatch, lambda _: [knowing(TOKENS)])
    with opened() as runtime:
        pieces = runtime.stream_batch(PROMPTS, temperature=0)
        for _ in range(7):
            next(pieces)
        assert runtime.generate(PROMPTS[0], temperature=0).text == REPLY
        assert BATCH not in runtime.ledger.components
        with pytest.raises(RuntimeUnusable, match="ended this"):
            next(pieces)


def test_the_end_of_a_text_inside_an_accepted_run_ends_that_answer_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The draft goes on behind what ends the text, and behind a stop text."""
    tokens = (*TOKENS, *b"and more, and more")
    draft_in_batches(monkeypatch, lambda _: [knowing(tokens)])
    options = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, stop=("goes",)),
        SamplingParams(temperature=0, max_tokens=11),
        SamplingParams(temperature=0, max_tokens=60),
    ]
    with opened() as runtime:
        results = runtime.generate_batch(PROMPTS, options)
    assert [(result.text, result.finish_reason) for result in results] == [
        (REPLY, "stop"),
        ("the tide comes in, the tide ", "stop"),
        (REPLY[:11], "length"),
        (REPLY[:60], "length"),
    ]


def test_no_answer_drafts_beyond_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of three tokens: one is the prompt's, one has a row of its own, one may be a draft's."""
    draft_in_batches(monkeypatch, lambda _: [knowing(TOKENS)])
    with opened() as runtime:
        del rows_of(runtime)[:]
        results = ask(runtime, max_tokens=3)
        assert rows_of(runtime)[2:] == [8]
    assert [result.text for result in results] == ["the"] * 4


def test_what_a_batch_cannot_draft_is_said() -> None:
    with opened("off") as runtime:
        assert ask(runtime)[0].stats.speculation is None
    with opened() as runtime:
        stats = ask(runtime, max_tokens=2)[0].stats.speculation
        assert stats is not None and stats["rounds"] == 0
        assert stats["off_reason"] == "neither the passes nor the answers have room for drafts"
    with opened() as runtime:
        whole = ask(runtime)[0].stats.batch
        assert whole is not None
        tables = 4 * 640 * 1024
        ledger = runtime.ledger
        ledger.budget_bytes = ledger.reserved_bytes + whole["num_bytes"] - tables
        results = ask(runtime)
        stats = results[0].stats.speculation
        assert stats is not None
        assert stats["off_reason"] == "the budget has no room for it beside the batch"
        assert results[0].text == REPLY


def test_a_batch_takes_fewer_drafts_where_there_is_less_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft_in_batches(monkeypatch, lambda _: [knowing(TOKENS)])
    with opened() as runtime:
        whole = ask(runtime)[0].stats.batch
        assert whole is not None
        del rows_of(runtime)[:]
        ledger = runtime.ledger
        ledger.budget_bytes = ledger.reserved_bytes + whole["num_bytes"] - 1
        results = ask(runtime)
        assert max(rows_of(runtime)[2:]) == 4 + 14
    assert [result.text for result in results] == [REPLY] * 4

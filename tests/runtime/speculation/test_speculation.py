"""Speculation over the fake model, for single answers and batches: the answers are those of the plain loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from promising_drafts import largest_speculation
from speculating import (
    CHEAP,
    CHEAP_BATCH,
    DEAR,
    DEAR_BATCH,
    FAIR_BATCH,
    ScriptedDraft,
    controller_of,
    half_right,
    perfect,
    random_trees,
    speculate_in_batches,
    speculate_with,
)

from lowtide import FakeModel, GenerationResult, Runtime, SamplingParams
from lowtide.memory.plan.line import BATCH
from lowtide.memory.plan.speculation.allocator import CostCurve
from lowtide.models.fake_model import TURN_END
from lowtide.runtime.errors import RuntimeUnusable
from lowtide.runtime.speculation.controller import SpeculationController
from lowtide.runtime.speculation.drafts import Draft, NgramDraft, TrigramDraft


@pytest.fixture(scope="module", autouse=True)
def _speculation_as_large_as_allowed() -> Iterator[None]:
    with largest_speculation():
        yield


REPLY = "the tide comes in, the tide goes out, the tide comes in again."
TOKENS = (*REPLY.encode(), TURN_END)
PREFIX = "A text that all of them begin with. "
PROMPTS = [PREFIX + end + "\n" for end in ("one", "two, and more of it", "", "three")]
Drafts = Callable[[int], Sequence[Draft]]
both_modes = pytest.mark.parametrize("mode", ["single", "batch"])


@dataclass
class Speculating:
    """A runtime that answers `PROMPTS` with drafts, one by one or in a batch."""

    mode: str
    runtime: Runtime
    model: FakeModel

    def generate(
        self, params: Sequence[SamplingParams] | None = None, **named: Any
    ) -> list[GenerationResult]:
        params = params or [SamplingParams(**{"temperature": 0, **named})] * len(PROMPTS)
        del self.model.rows[:]
        if self.mode == "batch":
            return self.runtime.generate_batch(PROMPTS, params)
        return [self.runtime.generate(*one) for one in zip(PROMPTS, params, strict=True)]

    @property
    def pass_sizes(self) -> list[int]:
        """Tokens of the decode passes, of the first answer alone in single mode."""
        if self.mode == "batch":
            return self.model.rows[2:]
        self.model.rows.clear()
        self.runtime.generate(PROMPTS[0], temperature=0)
        return self.model.rows[1:]


@contextlib.contextmanager
def speculating(
    mode: str,
    drafts_of: Drafts,
    *,
    reply: str = REPLY,
    context: int = 512,
    batch_size: int = 64,
    is_dear: bool = False,
) -> Iterator[Speculating]:
    model = FakeModel([reply], context=context, batch_size=batch_size)
    speculate = "auto" if mode == "batch" else "off"
    with (
        pytest.MonkeyPatch.context() as patch,
        Runtime.open(model, memory="8GiB", speculate=speculate) as runtime,
    ):
        if mode == "batch":
            speculate_in_batches(patch, drafts_of, DEAR_BATCH if is_dear else CHEAP_BATCH)
        else:
            cost = DEAR if is_dear else CHEAP
            max_draft = min(7, batch_size - 1)
            controller = controller_of(*drafts_of(0), cost=cost, max_draft=max_draft)
            speculate_with(runtime, controller)
        yield Speculating(mode, runtime, model)


def open_runtime(
    speculate: str = "off",
    *,
    controller: SpeculationController | None = None,
    context: int = 512,
    batch_size: int = 64,
) -> tuple[Runtime, FakeModel]:
    model = FakeModel([REPLY], context=context, batch_size=batch_size)
    runtime = Runtime.open(model, memory="8GiB", speculate=speculate)
    if controller is not None:
        speculate_with(runtime, controller)
    return runtime, model


def answers(results: Sequence[GenerationResult]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(result.text, result.token_ids, result.finish_reason) for result in results]


@both_modes
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
def test_answers_are_those_of_the_plain_loop(
    mode: str,
    seed: int,
    lengths: list[int | None],
    stop: tuple[str, ...],
    temperature: float,
    penalty: float,
    context: int,
    batch_size: int,
) -> None:
    params = [
        SamplingParams(
            max_tokens=length,
            stop=stop,
            temperature=temperature,
            repeat_penalty=penalty,
            seed=seed + i,
        )
        for i, length in enumerate(lengths)
    ]
    plain, unhelped = open_runtime(context=context)
    alone = [plain.generate(*one) for one in zip(PROMPTS, params, strict=True)]

    def drafts_of(i: int) -> list[Draft]:
        return [half_right(TOKENS, seed + i), NgramDraft()]

    with speculating(mode, drafts_of, context=context, batch_size=batch_size) as drafting:
        found = drafting.generate(params)
        assert answers(found) == answers(alone)
        for one, other in zip(alone, found, strict=True):
            assert one.stats.generated_tokens == other.stats.generated_tokens
        assert max(drafting.model.rows) <= batch_size
        if mode == "single":
            session = drafting.runtime._session
            assert session.token_ids == plain._session.token_ids
            session.sync()
            plain._session.sync()
            assert drafting.model._tokens == unhelped._tokens


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    max_tokens=st.integers(1, 80),
    temperature=st.sampled_from([0, 0.8, 5.0]),
    context=st.sampled_from([512, 60]),
)
def test_with_trees_of_any_shape_answers_and_cache_are_those_of_the_plain_loop(
    seed: int, max_tokens: int, temperature: float, context: int
) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    plain, unhelped = open_runtime(context=context)
    drafting, model = open_runtime(
        controller=controller_of(random_trees(TOKENS, seed)), context=context
    )
    for _ in range(2):
        prompt = PROMPTS[0]
        assert answers([drafting.generate(prompt, params)]) == answers(
            [plain.generate(prompt, params)]
        )
    assert drafting._session.token_ids == plain._session.token_ids
    drafting._session.sync()
    plain._session.sync()
    assert model._tokens == unhelped._tokens


def test_branches_are_accepted_and_counted() -> None:
    runtime, _ = open_runtime(controller=controller_of(random_trees(TOKENS, 3)))
    stats = runtime.generate(PROMPTS[0], temperature=0).stats.speculation
    assert stats is not None and stats["accepted"] >= stats["accepted_on_branches"] > 0


@both_modes
def test_perfect_drafts_save_passes(mode: str) -> None:
    with speculating(mode, lambda _: [perfect(TOKENS)]) as drafting:
        results = drafting.generate()
        sizes = drafting.pass_sizes
    assert len(sizes) <= -(-len(TOKENS) // 8) + 3
    assert max(sizes) == (4 * 8 if mode == "batch" else 8)
    for result in results:
        stats = result.stats.speculation
        assert stats is not None and result.text == REPLY
        assert stats["accepted"] >= len(REPLY) - 1 - stats["rounds"]
        assert stats["drafted"] >= stats["accepted"] and stats["mean_accepted"] > 4
        assert max(rows for rows, _ in stats["rows"]) == 8
        assert stats["drafts"] == ["scripted"] and set(stats["rounds_by_draft"]) == {"scripted"}
        assert stats["off_reason"] is None and stats["identical"]


@both_modes
@pytest.mark.parametrize("draft", [NgramDraft, TrigramDraft])
def test_free_drafts_save_passes_where_a_text_repeats(
    mode: str, draft: Callable[[], Draft]
) -> None:
    reply = "one two three four. " * 8
    with speculating(mode, lambda _: [draft()], reply=reply) as drafting:
        results = drafting.generate()
        assert [result.text for result in results] == [reply] * 4
        assert len(drafting.pass_sizes) < 0.5 * len(reply)


@both_modes
def test_where_nothing_pays_every_pass_is_plain_and_the_reason_is_reported(mode: str) -> None:
    with speculating(mode, lambda _: [perfect(TOKENS)], is_dear=True) as drafting:
        results = drafting.generate()
        assert max(drafting.pass_sizes) == (4 if mode == "batch" else 1)
    stats = results[0].stats.speculation
    assert stats is not None and stats["rounds"] == 0
    assert "no proposal was expected to pay" in stats["off_reason"]


@both_modes
@pytest.mark.parametrize(
    "script", [lambda _text: (), lambda _text: 1 / 0, lambda _text: (-5, 1 << 40)]
)
def test_a_draft_that_proposes_nothing_fails_or_is_invalid_changes_nothing(
    mode: str, script: Callable[[Sequence[int]], Any]
) -> None:
    with speculating(mode, lambda _: [ScriptedDraft(script)]) as drafting:
        results = drafting.generate()
    assert [result.text for result in results] == [REPLY] * 4
    for result in results:
        stats = result.stats.speculation
        assert stats is not None and stats["rounds"] == 0
        assert stats["off_reason"] == "no draft had a proposal"


@both_modes
def test_the_end_of_a_text_inside_an_accepted_run_ends_that_answer(mode: str) -> None:
    """The draft goes on after the end-of-text token, and after a stop text."""
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, stop=("goes",)),
        SamplingParams(temperature=0, max_tokens=11),
        SamplingParams(temperature=0, max_tokens=60),
    ]
    with speculating(mode, lambda _: [perfect((*TOKENS, *b"and more, and more"))]) as drafting:
        results = drafting.generate(params)
    assert [(result.text, result.finish_reason) for result in results] == [
        (REPLY, "stop"),
        ("the tide comes in, the tide ", "stop"),
        (REPLY[:11], "length"),
        (REPLY[:60], "length"),
    ]


@both_modes
@pytest.mark.parametrize("num_read", [1, 2, 3, 5, 6, 9, 14, 30])
def test_closing_in_the_middle_of_a_round_leaves_the_runtime_usable(
    mode: str, num_read: int
) -> None:
    drafts: list[ScriptedDraft] = []

    def drafts_of(_: int) -> list[ScriptedDraft]:
        drafts.append(perfect(TOKENS))
        return drafts[-1:]

    with speculating(mode, drafts_of) as drafting:
        runtime = drafting.runtime
        before = dict(runtime.ledger.components)
        prompts = PROMPTS if mode == "batch" else PROMPTS[:1]
        texts = [""] * len(prompts)
        if mode == "batch":
            chunks = runtime.stream_batch(prompts, temperature=0)
        else:
            chunks = ((0, chunk) for chunk in runtime.stream(prompts[0], temperature=0))  # type: ignore[assignment]
        for _ in range(num_read):
            index, chunk = next(chunks)
            texts[index] += chunk.text
        chunks.close()
        assert all(REPLY.startswith(text) for text in texts)
        assert dict(runtime.ledger.components) == before
        if mode == "batch":
            assert len(drafts) == 4 and all(draft.is_closed for draft in drafts)
        assert [result.text for result in drafting.generate()] == [REPLY] * 4
    assert all(draft.is_closed for draft in drafts)


def test_closing_in_the_middle_of_a_round_leaves_the_cache_of_the_plain_loop() -> None:
    runtime, model = open_runtime(controller=controller_of(perfect(TOKENS)))
    plain, unhelped = open_runtime()
    for num_read in (2, 3, 7, 12):
        for one in (runtime, plain):
            chunks = one.stream(PROMPTS[0], temperature=0)
            for _ in range(num_read):
                next(chunks)
            chunks.close()
        assert runtime._session.token_ids == plain._session.token_ids
        assert model.num_tokens >= unhelped.num_tokens
        runtime._session.sync()
        assert model._tokens == unhelped._tokens


def test_another_answer_in_the_middle_of_a_round_ends_the_batch() -> None:
    with speculating("batch", lambda _: [perfect(TOKENS)]) as drafting:
        chunks = drafting.runtime.stream_batch(PROMPTS, temperature=0)
        for _ in range(7):
            next(chunks)
        assert drafting.runtime.generate(PROMPTS[0], temperature=0).text == REPLY
        assert BATCH not in drafting.runtime.ledger.components
        with pytest.raises(RuntimeUnusable, match="was ended by another answer"):
            next(chunks)


def test_drafts_that_follow_one_chat_are_right_in_another() -> None:
    runtime, _ = open_runtime(controller=controller_of(NgramDraft(), TrigramDraft()))
    plain, _ = open_runtime()
    for prompt in ("Say it.\n", "Then say it once more.\n", "Say it.\n", "S\n"):
        one, other = (some.generate(prompt, temperature=0) for some in (runtime, plain))
        assert answers([one]) == answers([other])


def test_a_controller_that_is_off_says_why() -> None:
    runtime, _ = open_runtime(controller=SpeculationController.off("the plan has no room for it"))
    stats = runtime.generate(PROMPTS[0], temperature=0).stats.speculation
    assert stats is not None and stats["off_reason"] == "the plan has no room for it"


def test_each_sequence_has_its_own_acceptance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of one are right, those of two are wrong, one has none: tokens go where they are right."""
    wrong = ScriptedDraft(lambda _: b"#" * 7)
    drafts = [perfect(TOKENS), wrong, wrong, ScriptedDraft(lambda _: ())]
    speculate_in_batches(monkeypatch, lambda i: [drafts[i]], expected=FAIR_BATCH)
    runtime, _ = open_runtime("auto")
    results = runtime.generate_batch(PROMPTS, temperature=0)
    assert [result.text for result in results] == [REPLY] * 4
    right, first, second, silent = (result.stats.speculation for result in results)
    assert right is not None and first is not None and second is not None and silent is not None
    assert right["accepted"] > 40
    assert first["accepted"] == second["accepted"] == 0
    assert first["drafted"] < right["drafted"]
    assert silent["rounds"] == 0 and silent["off_reason"] == "no draft had a proposal"


def test_a_pass_has_no_more_tokens_than_the_batch_size() -> None:
    with speculating("batch", lambda _: [perfect(TOKENS)], batch_size=10) as drafting:
        results = drafting.generate()
        assert max(drafting.model.rows) == 10
    assert [result.text for result in results] == [REPLY] * 4


def test_a_batch_drafts_as_the_runtime_was_opened() -> None:
    """Costs are measured in the batch's own sequences, which are empty again before the prompts."""
    runtime, _ = open_runtime("trigram:draft=3")
    results = runtime.generate_batch(PROMPTS, temperature=0)
    assert [result.text for result in results] == [REPLY] * 4
    stats = results[0].stats.speculation
    assert stats is not None and stats["drafts"] == ["trigram"]
    assert all(rows <= 4 for rows, _ in stats["rows"])


def test_verifying_that_loses_time_stops_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are expected to be cheap and are not: plain passes make up for the loss."""
    steep = CostCurve(num_rows=(1, 4, 5, 64), seconds=(1.0, 1.0, 90.0, 90.0))
    speculate_in_batches(monkeypatch, lambda _: [perfect(TOKENS)], cost=steep)
    runtime, _ = open_runtime("auto")
    results = runtime.generate_batch(PROMPTS, temperature=0)
    stats = results[0].stats.speculation
    assert stats is not None and stats["rounds"] == 1
    assert stats["verifying_s"] == pytest.approx(90.0)
    assert results[0].text == REPLY


def test_no_sequence_drafts_more_than_it_has_room_for() -> None:
    """Answers of three tokens: one comes from the prefill, one has a row of its own, one may be drafted.

    The first answer has its second token beside the prompts of the others, and no draft to verify.
    """
    with speculating("batch", lambda _: [perfect(TOKENS)]) as drafting:
        results = drafting.generate(max_tokens=3)
        assert drafting.pass_sizes == [7]
    assert [result.text for result in results] == ["the"] * 4


def test_a_batch_without_drafts_says_why() -> None:
    runtime, _ = open_runtime()
    assert runtime.generate_batch(PROMPTS, temperature=0)[0].stats.speculation is None
    runtime, _ = open_runtime("auto")
    stats = runtime.generate_batch(PROMPTS, max_tokens=2)[0].stats.speculation
    assert stats is not None and stats["rounds"] == 0
    assert stats["off_reason"] == "neither the passes nor the answers have room for drafts"
    batch = runtime.generate_batch(PROMPTS, temperature=0)[0].stats.batch
    assert batch is not None
    tables, ledger = 4 * 640 * 1024, runtime.ledger
    ledger.budget_bytes = ledger.reserved_bytes + batch["num_bytes"] - tables
    (result, *_) = runtime.generate_batch(PROMPTS, temperature=0)
    assert result.stats.speculation is not None and result.text == REPLY
    assert (
        result.stats.speculation["off_reason"] == "the budget has no room for it beside the batch"
    )


def test_a_batch_drafts_less_where_there_is_less_memory() -> None:
    with speculating("batch", lambda _: [perfect(TOKENS)]) as drafting:
        batch = drafting.generate()[0].stats.batch
        assert batch is not None
        ledger = drafting.runtime.ledger
        ledger.budget_bytes = ledger.reserved_bytes + batch["num_bytes"] - 1
        results = drafting.generate()
        assert max(drafting.pass_sizes) == 4 + 14
    assert [result.text for result in results] == [REPLY] * 4

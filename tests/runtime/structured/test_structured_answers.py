"""Structured output of whole answers over the fake model: always in the format, and whole wherever they end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from speculating import controller_of, half_right, speculate_with

from lowtide import FakeModel, Runtime, SamplingParams
from lowtide.memory.plan.line import STRUCTURED
from lowtide.memory.units import OverBudget
from lowtide.models.draft_tree import TokenTree
from lowtide.models.errors import BadOption
from lowtide.runtime.speculation.constrained import legal_part
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.formats import Choice, JsonObject, JsonSchema, Regex

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GREEDY = SamplingParams(temperature=0, max_tokens=100)


def test_a_reply_that_is_legal_already_is_unchanged(fake_runtime: Callable[..., Runtime]) -> None:
    reply = '{"name": "Ada", "age": 36}'
    result = fake_runtime(reply).generate("Q\n", GREEDY, constraint=PERSON)
    assert (result.text, result.finish_reason) == (reply, "stop")
    assert result.structured is not None and result.structured["masks"] == 0
    assert (result.structured["enforced"], result.structured["complete"]) == ("exact", True)


@pytest.mark.parametrize("temperature", [0, 0.8, 5.0])
def test_another_reply_is_brought_into_the_format(
    fake_runtime: Callable[..., Runtime], temperature: float
) -> None:
    runtime = fake_runtime("I am sorry, I cannot.")
    for seed in range(10):
        result = runtime.generate(
            "Q\n", constraint=PERSON, temperature=temperature, seed=seed, max_tokens=60
        )
        jsonschema.validate(json.loads(result.text), PERSON)


@pytest.mark.parametrize("max_tokens", range(21, 60, 3))
def test_max_tokens_closes_the_answer(
    fake_runtime: Callable[..., Runtime], max_tokens: int
) -> None:
    runtime = fake_runtime('{"name": "' + "Ada " * 50)
    result = runtime.generate("Q\n", GREEDY, constraint=PERSON, max_tokens=max_tokens)
    jsonschema.validate(json.loads(result.text), PERSON)
    assert result.finish_reason == "length" and len(result.token_ids) <= max_tokens
    assert result.structured is not None and result.structured["closed"]
    assert result.structured["closing_tokens"] == len('","age":0}')


def test_the_end_of_the_context_closes_the_answer(fake_runtime: Callable[..., Runtime]) -> None:
    runtime = fake_runtime('{"name": "' + "Ada " * 200, context=100)
    result = runtime.generate("Q\n", GREEDY, constraint=PERSON, max_tokens=None)
    jsonschema.validate(json.loads(result.text), PERSON)
    assert result.finish_reason == "context"
    assert runtime.generate("Q\n", GREEDY, constraint=["yes"]).text == "yes"


def test_the_end_of_the_memory_closes_the_answer(
    fake_runtime: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowtide.runtime.generation.watchdog import Watchdog

    runtime = fake_runtime('{"name": "' + "Ada " * 50)
    monkeypatch.setattr(Watchdog, "is_over", lambda _self: True)
    result = runtime.generate("Q\n", GREEDY, constraint=PERSON)
    jsonschema.validate(json.loads(result.text), PERSON)
    assert result.finish_reason == "memory"


def test_an_answer_that_cannot_be_whole_is_refused_first(
    fake_runtime: Callable[..., Runtime],
) -> None:
    runtime = fake_runtime()
    with pytest.raises(BadOption, match=r"required at /required .* max_tokens is 10"):
        runtime.generate("Q\n", constraint=PERSON, max_tokens=10)
    with pytest.raises(BadOption, match="cannot be enforced"):
        runtime.generate("Q\n", constraint={"not": {}})
    assert runtime.fake.rows == []  # type: ignore[attr-defined]


def test_stop_texts_and_constraints_exclude_each_other() -> None:
    with pytest.raises(BadOption, match="leave one of them out"):
        SamplingParams(stop=("}",), constraint=PERSON)
    with pytest.raises(BadOption, match="it must be JsonSchema"):
        SamplingParams(constraint=3)


def test_an_answer_ends_where_nothing_may_follow(fake_runtime: Callable[..., Runtime]) -> None:
    runtime = fake_runtime("yes and so on")
    result = runtime.generate("Q\n", GREEDY, constraint=Choice("yes", "no"))
    assert (result.text, result.finish_reason) == ("yes", "stop")
    rows = runtime.fake.rows  # type: ignore[attr-defined]
    assert len(rows) == 1  # the prompt: behind "y" all is forced


def test_chats_and_batches_have_constraints_of_their_own(
    fake_runtime: Callable[..., Runtime],
) -> None:
    runtime = fake_runtime("[1, 2")
    chunks = list(runtime.chat([{"role": "user", "content": "Q"}], GREEDY, constraint=JsonObject()))
    assert isinstance(json.loads("".join(chunk.text for chunk in chunks)), dict)
    params = [
        SamplingParams(temperature=0, max_tokens=30, constraint=one)
        for one in (re.compile("[0-9]{2}"), ["a", "b"], None)
    ]
    texts = [result.text for result in runtime.generate_batch(["Q\n"] * 3, params)]
    assert re.fullmatch("[0-9]{2}", texts[0]) and texts[1] in ("a", "b") and texts[2] == "[1, 2"


@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.0, 0.7, 3.0]))
def test_drafts_do_not_change_a_constrained_answer(seed: int, temperature: float) -> None:
    reply = '{"name": "Ada Lovelace", "age": 36}'
    params = SamplingParams(
        temperature=temperature, seed=seed, max_tokens=20 + seed % 60, constraint=PERSON
    )
    plain = Runtime.open(FakeModel([reply]), memory="8GiB").generate("Q\n", params)
    runtime = Runtime.open(FakeModel([reply]), memory="8GiB")
    speculate_with(runtime, controller_of(half_right(list(reply.encode()), seed)))
    drafted = runtime.generate("Q\n", params)
    assert (drafted.token_ids, drafted.finish_reason) == (plain.token_ids, plain.finish_reason)
    jsonschema.validate(json.loads(drafted.text), PERSON)


def test_the_pass_of_the_prompt_reads_what_must_come_first(
    fake_runtime: Callable[..., Runtime],
) -> None:
    reply = '{"name":"Ada","age":36}'
    runtime = fake_runtime(reply)
    params = SamplingParams(temperature=0, max_tokens=60, constraint=JsonSchema(PERSON, "compact"))
    prompt_tokens = runtime.generate("Q\n", replace(params, constraint=None)).stats.prompt_tokens
    runtime = fake_runtime(reply)
    assert runtime.generate("Q\n", params).text == reply
    first = runtime.fake.rows[0]  # type: ignore[attr-defined]
    read = first if isinstance(first, int) else len(first)
    assert read == prompt_tokens + len('{"name":"')
    short = replace(params, max_tokens=24)
    assert fake_runtime(reply).generate("Q\n", short).text == reply


def test_forced_text_saves_passes(fake_runtime: Callable[..., Runtime]) -> None:
    reply = '{"name":"Ada","age":36}'
    runtime = fake_runtime(reply)
    params = SamplingParams(temperature=0, max_tokens=60, constraint=JsonSchema(PERSON, "compact"))
    result = runtime.generate("Q\n", params)
    assert result.text == reply and result.structured is not None
    num_passes = len(runtime.fake.rows) - 1  # type: ignore[attr-defined]
    assert result.structured["passes_saved"] >= 14
    assert num_passes + result.structured["passes_saved"] <= len(reply)


class OneByOne(Constraint):
    """The same answers as another constraint, without forced text."""

    def __init__(self, inner: Constraint) -> None:
        self._inner = inner

    def allows(self, token_id: int) -> bool:
        return self._inner.allows(token_id)

    def legal_ids(self) -> Any:
        return self._inner.legal_ids()

    def advance(self, token_id: int) -> None:
        self._inner.advance(token_id)

    def fork(self) -> OneByOne:
        return OneByOne(self._inner.fork())

    def closing(self, max_tokens: int) -> Any:
        return self._inner.closing(max_tokens)

    @property
    def is_accepting(self) -> bool:
        return self._inner.is_accepting


@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.0, 0.7, 3.0]))
def test_forced_text_does_not_change_an_answer(seed: int, temperature: float) -> None:
    replies = ['{"name": "Ada Lovelace", "age": 36}', "I am sorry"]
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=30 + seed % 60)
    with Runtime.open(FakeModel([replies[seed % 2]]), memory="8GiB") as runtime:
        made = JsonSchema(PERSON, "compact").compile(runtime._engine._vocabulary)
        skipped = runtime.generate("Q\n", params, response_format=made)
        plain = runtime.generate("Q\n", params, response_format=OneByOne(made))
        logged = runtime.generate("Q\n", params, response_format=made, logprobs=0)
    assert skipped.structured is not None and plain.structured is not None
    assert logged.token_ids == skipped.token_ids
    assert skipped.structured["passes_saved"] > plain.structured["passes_saved"] == 0
    if temperature == 0:
        assert skipped.token_ids == plain.token_ids
    jsonschema.validate(json.loads(skipped.text), PERSON)


@pytest.mark.parametrize("context", range(34, 60, 3))
def test_forced_text_ends_with_the_context(
    fake_runtime: Callable[..., Runtime], context: int
) -> None:
    runtime = fake_runtime('{"name":"Ada Lovelace', context=context)
    form = JsonSchema(PERSON, "compact")
    result = runtime.generate("Q\n", GREEDY, constraint=form, max_tokens=None)
    jsonschema.validate(json.loads(result.text), PERSON)
    assert runtime.generate("Q\n", GREEDY, constraint=["yes"]).text == "yes"


def test_illegal_drafts_are_cut_before_the_pass(fake_runtime: Callable[..., Runtime]) -> None:
    tree = TokenTree((ord("1"), ord("x"), ord("2"), ord("y")), (-1, 0, 0, 2))
    runtime = fake_runtime()
    answer = runtime._engine.constrained_answer(SamplingParams(constraint=Regex("[0-9]+")))
    assert answer is not None
    assert legal_part(tree, answer) == TokenTree((ord("1"), ord("2")), (-1, 0))
    assert len(legal_part(TokenTree.chain(b"abc"), answer)) == 0


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -5, "maximum": 120},
            {"type": "number"},
            {"type": "string", "minLength": 3, "maxLength": 9},
            {"enum": ["red", 3, None, True]},
            {"type": "boolean"},
            {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"},
        ]
    ),
    lambda inner: st.one_of(
        st.fixed_dictionaries(
            {
                "type": st.just("array"),
                "items": inner,
                "minItems": st.integers(0, 2),
                "maxItems": st.integers(2, 4),
            }
        ),
        st.dictionaries(st.sampled_from(["a", "bc", "x y"]), inner, max_size=3).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:2],
                "additionalProperties": False,
            }
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=6,
)


@given(schema=SCHEMAS, seed=st.integers(0, 1000), max_tokens=st.integers(16, 200))
def test_every_answer_follows_its_schema(
    schema: dict[str, Any], seed: int, max_tokens: int
) -> None:
    runtime = Runtime.open(FakeModel([f'{{"a": [{seed}, "x'], context=256), memory="8GiB")
    try:
        result = runtime.generate(
            "Q\n", constraint=schema, seed=seed, temperature=seed % 4, max_tokens=max_tokens
        )
    except BadOption as refused:
        assert "shortest answer" in str(refused) or "cannot be completed" in str(refused)
        return
    jsonschema.validate(json.loads(result.text), schema)
    assert len(result.token_ids) <= max_tokens


class Vowels(Constraint):
    """A constraint of a user's own: three vowels."""

    def __init__(self, num_left: int = 3) -> None:
        self._num_left = num_left

    def allows(self, token_id: int) -> bool:
        return self._num_left > 0 and token_id in b"aeiou"

    def legal_ids(self) -> Any:
        import numpy as np

        return np.array(sorted(b"aeiou") if self._num_left else [], np.int32)

    def advance(self, token_id: int) -> None:
        self._num_left -= 1

    def fork(self) -> Vowels:
        return Vowels(self._num_left)

    @property
    def is_accepting(self) -> bool:
        return self._num_left == 0


def test_a_constraint_of_ones_own(fake_runtime: Callable[..., Runtime]) -> None:
    runtime = fake_runtime("lowtide")
    for _ in range(2):
        assert re.fullmatch("[aeiou]{3}", runtime.generate("Q\n", constraint=Vowels()).text)


def test_the_plan_reserves_the_memory_when_asked() -> None:
    with Runtime.open(FakeModel(), memory="8GiB", structured=True) as runtime:
        (row,) = [row for row in runtime.plan.rows if row.component == STRUCTURED]
        assert runtime.ledger.components[STRUCTURED] == row.num_bytes > 5 << 20
    with Runtime.open(FakeModel(), memory="8GiB") as runtime:
        assert STRUCTURED not in runtime.ledger.components
        runtime.generate("Q\n", constraint=Regex("a"))
        assert runtime.ledger.components[STRUCTURED] == row.num_bytes


def test_a_constraint_without_room_is_refused() -> None:
    with Runtime.open(FakeModel(), memory="8GiB") as runtime:
        runtime.ledger.reserve("other", (8 << 30) - runtime.ledger.reserved_bytes)
        with pytest.raises(OverBudget, match="structured output"):
            runtime.generate("Q\n", constraint=Regex("a"))


def test_styles_reach_the_answer(fake_runtime: Callable[..., Runtime]) -> None:
    runtime = fake_runtime('{"name": "Ada", "age": 36}')
    compact = runtime.generate("Q\n", GREEDY, constraint=JsonSchema(PERSON, "compact"))
    assert " " not in compact.text.replace("Ada", "")

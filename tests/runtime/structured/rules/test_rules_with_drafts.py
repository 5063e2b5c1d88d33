"""Rules with drafts, batches and chats: the answers are those of one token after the other, and random ones hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lowtide import (
    AllOf,
    Avoid,
    Choice,
    FakeModel,
    GenerationResult,
    Length,
    Ltl,
    Must,
    Paths,
    Runtime,
    SamplingParams,
)

GREEDY = SamplingParams(temperature=0, max_tokens=70)
TEXT = "the sea and the moon and the sea and the moon and the sea and the moon"
TRIPLES = [("moon", "pulls", "sea"), ("sea", "is", "salty"), ("moon", "is", "round")]
RULES: dict[str, Any] = {
    "avoid": Avoid("sea and", "moon and the"),
    "must": Must("tide", "sea"),
    "length": Length(min_words=4, max_words=9),
    "paths": Paths(TRIPLES, least=1),
    "ltl": Ltl("F place & (!place U pick)", ["pick", "place", "wait"]),
    "choice": Choice("the sea", "the sea and the moon", "the moon"),
    "all": AllOf(Avoid("moon and"), Must("tide"), Length(max_words=12)),
}


def opened(**options: Any) -> Runtime:
    return Runtime.open(FakeModel([TEXT], context=512), memory="8GiB", **options)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_do_not_change_the_answer(name: str, temperature: float) -> None:
    prompt = f"{TEXT}\n"
    options = {"temperature": temperature, "seed": 5, "constraint": RULES[name]}
    plain = opened().generate(prompt, GREEDY, **options)
    for speculate in ("ngram", "trigram"):
        drafted = opened(speculate=speculate).generate(prompt, GREEDY, **options)
        assert drafted.token_ids == plain.token_ids
    assert plain.structured is not None and plain.structured["complete"]


@pytest.mark.parametrize("name", RULES)
def test_a_batch_and_a_chat_give_the_answers_of_one(name: str) -> None:
    runtime = opened(sequences=3)
    alone = runtime.generate("A\n", GREEDY, constraint=RULES[name])
    batch = runtime.generate_batch(["A\n"] * 3, GREEDY, constraint=RULES[name])
    assert [one.token_ids for one in batch] == [alone.token_ids] * 3
    talk = [{"role": "user", "content": "A"}]
    first = GenerationResult.of(runtime.chat(talk, GREEDY, constraint=RULES[name]))
    again = [*talk, {"role": "assistant", "content": first.text}, *talk]
    second = GenerationResult.of(runtime.chat(again, GREEDY, constraint=RULES[name]))
    for one in (first, second):
        assert one.structured is not None and one.structured["complete"]


@pytest.fixture(scope="module")
def random_texts() -> Iterator[Any]:
    """Draws answers of a fake model at a temperature that makes every token likely."""
    with opened() as runtime:

        def drawn(constraint: Any, number: int) -> Iterator[str]:
            for seed in range(number):
                yield runtime.generate(
                    "A\n",
                    constraint=constraint,
                    temperature=50,
                    top_k=0,
                    top_p=1,
                    min_p=0,
                    seed=seed,
                    max_tokens=70,
                ).text

        yield drawn


NUMBERS = [60, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("number", NUMBERS)
def test_every_path_of_random_answers_exists(random_texts: Any, number: int) -> None:
    two_hops = {"moon \u2192 pulls \u2192 sea \u2192 is \u2192 salty"}
    paths = two_hops | {" \u2192 ".join(triple) for triple in TRIPLES}
    for text in random_texts(Paths(TRIPLES, least=1), number):
        found = [one.partition("</PATH>")[0] for one in text.split("<PATH>")[1:]]
        assert found and set(found) <= paths


@pytest.mark.parametrize("number", NUMBERS)
def test_every_random_plan_satisfies_the_formula(random_texts: Any, number: int) -> None:
    for text in random_texts(RULES["ltl"], number):
        plan = text.split("\n")
        assert "pick" in plan[: plan.index("place")] and {*plan} <= {"pick", "place", "wait", ""}


@pytest.mark.parametrize("number", NUMBERS)
def test_no_denied_text_appears(random_texts: Any, number: int) -> None:
    denied = ("a", "e ", " t", "th")
    for text in random_texts(Avoid(*denied), number):
        assert not any(one in text for one in denied)

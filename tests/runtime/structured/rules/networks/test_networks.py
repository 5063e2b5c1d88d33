"""Choices and paths of a graph: every answer is one of them, with any tokens."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_pieces import PieceTokenizer, random_answer

from lowtide import AllOf, Avoid, Choice, Paths, Runtime, SamplingParams
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.rules.networks.network import NetworkReader, OneOf
from lowtide.runtime.structured.vocabulary import TokenVocabulary

PIECES = [
    "Ad",
    "a b",
    " \u2192",
    "\u2192 ",
    "r1",
    "r1 ",
    "</PATH>",
    "> x",
    "H>b",
    "<PATH>",
    "x<PATH>A",
    "ab",
    "ba",
]
VOCABULARY = TokenVocabulary(PieceTokenizer(PIECES), 300)
GREEDY = SamplingParams(temperature=0, max_tokens=80)
NAMES = ("A", "Ad", "Ada", "B b", "C", "D\u00e9", "ab", "abc", "r1", "r2 to")


def random_triples(seed: int, count: int = 60) -> list[tuple[str, str, str]]:
    chooser = random.Random(seed)
    names = [*NAMES, *(f"n{i}" for i in range(30))]
    return [
        (chooser.choice(names), chooser.choice(("r1", "r2 to", "r")), chooser.choice(names))
        for _ in range(count)
    ]


def exists(path: str, triples: list[tuple[str, str, str]], max_hops: int) -> bool:
    names = path.split(" \u2192 ")
    hops = [tuple(names[i : i + 3]) for i in range(0, len(names) - 2, 2)]
    return len(names) % 2 == 1 and 1 <= len(hops) <= max_hops and set(hops) <= set(triples)


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=12), st.integers(0, 99))
def test_answers_are_choices(texts: list[str], seed: int) -> None:
    constraint = Choice(texts).compile(VOCABULARY)
    assert random_answer(constraint, VOCABULARY, random.Random(seed)) in texts
    state = constraint.fork()
    while not state.is_done:
        legal = state.legal_ids().tolist()
        assert legal == [i for i in range(VOCABULARY.num_tokens) if state.allows(i)]
        if not legal:
            break
        state.advance(random.Random(seed).choice(legal))


def test_forced_text_is_what_all_choices_share() -> None:
    reader = NetworkReader(OneOf([b"the sea", b"the sky", b"the"]))
    assert reader.forced(reader.start) == b"the"
    longer = NetworkReader(OneOf([b"the sea", b"the sky"]))
    assert longer.forced(longer.start) == b"the s"


@pytest.mark.parametrize("max_hops", [1, 2, 4])
def test_every_path_between_the_markers_exists(max_hops: int) -> None:
    num_paths = 0
    for seed in range(25):
        triples = random_triples(seed)
        constraint = Paths(triples, max_hops=max_hops, least=1).compile(VOCABULARY)
        for again in range(14):
            text = random_answer(
                constraint, VOCABULARY, random.Random(again), likely=b"<PATH>r12 n", max_tokens=80
            )
            found = text.split("<PATH>")[1:]
            num_paths += len(found)
            assert found
            for path in found:
                inside, marker, _ = path.partition("</PATH>")
                assert marker and exists(inside, triples, max_hops), inside
    assert num_paths >= 350


def test_an_answer_that_is_one_path() -> None:
    triples = random_triples(3)
    heads = [triples[0][0], triples[5][0]]
    constraint = Paths(triples, max_hops=3, markers=None, starts=heads).compile(VOCABULARY)
    for seed in range(200):
        text = random_answer(constraint, VOCABULARY, random.Random(seed), max_tokens=70)
        assert exists(text, triples, 3) and text.split(" \u2192 ")[0] in heads


def test_a_graph_takes_little_memory() -> None:
    triples = random_triples(1, 5000)
    # Every path of two hops as tokens of 4 bytes would take megabytes.
    assert Paths(triples).num_bytes < 12 * 5000 + 4000


def test_free_text_and_paths_of_a_model(fake_runtime: Callable[..., Runtime]) -> None:
    triples = "sea\tis\tsalty\nmoon,pulls,sea\n# a remark\n"
    runtime = fake_runtime("I think <PATH>moon \u2192 eats \u2192 cheese</PATH> so it is.")
    result = runtime.generate("Q\n", GREEDY, constraint=Paths(triples))
    before, path = result.text.split("<PATH>")
    assert before == "I think " and path.startswith("moon \u2192 pulls \u2192 sea")
    plain = fake_runtime("No paths here.").generate("Q\n", GREEDY, constraint=Paths(triples))
    assert plain.text == "No paths here."
    both = AllOf(Paths(triples, least=1), Avoid("moon"))
    result = fake_runtime("No.").generate("Q\n", GREEDY, constraint=both)
    assert "<PATH>sea \u2192 is \u2192 salty</PATH>" in result.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Paths("a b c"), "line 1 of the triples"),
        (lambda: Paths([("a", "b")]), "three texts"),
        (lambda: Paths(""), "no triples"),
        (lambda: Paths([("a", "r", "b \u2192 c")]), "rename it"),
        (lambda: Paths([("a", "r", "b")], starts=["z"]), "no triple begins with 'z'"),
        (lambda: Paths([("a", "r", "b")], max_hops=0), "path_hops is 0"),
        (lambda: Paths([("a", "r", "b")], markers=("", "x")), "marker of paths is empty"),
    ],
)
def test_wrong_graphs_are_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        wrong()

"""Plans satisfy their formula: held against the definition of LTLf on whole traces."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest
from token_pieces import PieceTokenizer, random_answer

from lowtide import Ltl, Runtime, SamplingParams
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.rules.ltl.automaton import Automaton
from lowtide.runtime.structured.rules.ltl.formula import Formula, parse_formula
from lowtide.runtime.structured.vocabulary import TokenVocabulary

ACTIONS = ["pick", "place", "go(kitchen)", "go(hall)", "wait", "pick up", "look-around"]
VOCABULARY = TokenVocabulary(
    PieceTokenizer(["pi", "go(", "\npl", "ck up\n", "wait\n", "ll)\n"]), 300
)


def holds(formula: Formula, trace: list[int], at: int = 0) -> bool:
    """Whether a formula holds at a step of a trace that has this step, by the definition."""
    behind = range(at, len(trace))
    parts = formula.parts
    match formula.operator:
        case "true":
            return True
        case "false":
            return False
        case "is":
            return trace[at] == formula.action
        case "is not":
            return trace[at] != formula.action
        case "and":
            return all(holds(part, trace, at) for part in parts)
        case "or":
            return any(holds(part, trace, at) for part in parts)
        case "next":
            return at + 1 < len(trace) and holds(parts[0], trace, at + 1)
        case "weak next":
            return at + 1 >= len(trace) or holds(parts[0], trace, at + 1)
        case "until":
            return any(
                holds(parts[1], trace, i) and all(holds(parts[0], trace, j) for j in range(at, i))
                for i in behind
            )
    return all(
        holds(parts[1], trace, i) or any(holds(parts[0], trace, j) for j in range(at, i))
        for i in behind
    )


def random_formula(chooser: random.Random, depth: int) -> str:
    if depth == 0 or chooser.random() < 0.2:
        return chooser.choice(
            ["pick", "place", "go(kitchen)", "go(hall)", "wait", '"pick up"', "true"]
        )
    if chooser.random() < 0.5:
        operator = chooser.choice(["!", "X ", "N ", "F ", "G "])
        return f"{operator}({random_formula(chooser, depth - 1)})"
    operator = chooser.choice(["&", "|", "->", "<->", "U", "R", "W"])
    return f"({random_formula(chooser, depth - 1)} {operator} {random_formula(chooser, depth - 1)})"


def test_the_automaton_accepts_what_the_definition_does() -> None:
    num_checked = 0
    for seed in range(150):
        chooser = random.Random(seed)
        parsed = parse_formula(random_formula(chooser, 3), ACTIONS)
        traces = [list(trace) for n in (1, 2, 3) for trace in product(range(5), repeat=n)]
        try:
            automaton = Automaton(parsed, len(ACTIONS))
        except BadOption as error:
            assert "satisfies" in str(error)
            assert not any(holds(parsed, trace) for trace in traces)
            continue
        for trace in chooser.sample(traces, 60):
            state = 0
            for action in trace:
                state = automaton.follow(state, action)
            assert automaton.is_accepting[state] == holds(parsed, trace)
            num_checked += 1
    assert num_checked > 5000


def test_every_random_plan_satisfies_its_formula() -> None:
    num_plans = 0
    for seed in range(60):
        chooser = random.Random(seed)
        formula = random_formula(chooser, 4)
        try:
            constraint = Ltl(formula, ACTIONS).compile(VOCABULARY)
            texts = [
                random_answer(
                    constraint, VOCABULARY, random.Random(i), max_tokens=chooser.randint(90, 160)
                )
                for i in range(20)
            ]
        except BadOption:
            continue
        for text in texts:
            trace = [ACTIONS.index(action) for action in text.split("\n")]
            assert holds(parse_formula(formula, ACTIONS), trace)
            num_plans += 1
    assert num_plans >= 1000


def test_a_plan_of_a_model(fake_runtime: Callable[..., Runtime]) -> None:
    formula = "F place & (!place U pick) & G(pick -> X !pick) & G(go(kitchen) -> F go(hall))"
    runtime = fake_runtime("place\ngo(kitchen)\npick up\npick\npick\nplace")
    result = runtime.generate(
        "Q\n", SamplingParams(temperature=0, max_tokens=70), constraint=Ltl(formula, ACTIONS)
    )
    trace = [ACTIONS.index(action) for action in result.text.split("\n")]
    assert holds(parse_formula(formula, ACTIONS), trace)


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("F fly", "'fly' is no action; the actions are pick"),
        ("F (pick", "a bracket is not closed"),
        ("pick place", "'place' follows its end"),
        ("pick &", "it ends where an action should come"),
        ("U pick", "'U' comes where an action should"),
        ("pick ) ", "follows its end"),
        ("<", "cannot be read"),
        ("", "it ends where"),
        ("pick & place", "no list of the actions satisfies"),
        ("G pick & F place", "no list of the actions satisfies"),
        ("(" * 200 + "pick" + ")" * 200, "deeper than 100"),
        ("!" * 200 + "pick", "deeper than 100"),
        ("G (pick -> " + "X " * 12 + "place)", "make it simpler"),
        (" & ".join(f"F (pick & F ({'X ' * i}place))" for i in range(20)), "make it simpler"),
        ("pick | " * 900 + "pick", "at most 4,096"),
    ],
)
def test_wrong_formulas_are_refused_in_a_sentence(formula: str, message: str) -> None:
    with pytest.raises(BadOption, match=message.replace("(", r"\(")):
        Ltl(formula, ACTIONS)


def test_wrong_actions_are_refused() -> None:
    for actions, message in (
        ([], "none or an empty one"),
        (["a\nb"], "rename it"),
        ([""], "empty"),
    ):
        with pytest.raises(BadOption, match=message):
            Ltl("true", actions)

"""Questions about sentences that are hidden in a long text: what to hide, what to ask, what is right.

The facts are invented, so that no model knows them. Knows no model and no token.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

KINDS = ("pass key", "fact", "two facts")
"""What a filtered prompt has to answer."""
HARD_KINDS = ("paraphrase", "two questions", "counting", "question first")
"""Asked in other words, twice, for all places, or before the text: what filtering may well lose."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer's beginning, `lead`, and what has to follow it soon: one of `accepted`."""

    lead: str
    accepted: tuple[str, ...]

    def is_in(self, text: str) -> bool:
        """Whether what followed has one of them, as a word."""
        return any(re.search(rf"\b{re.escape(answer)}\b", text) for answer in self.accepted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`sentences` to hide, what to ask about them, and the `replies` that are all wanted.

    `aside` follows each of the sentences, and is not needed for an answer. `comes_first` has the question
    before the text.
    """

    kind: str
    sentences: tuple[str, ...]
    text: str
    replies: tuple[Reply, ...]
    aside: str = ""
    comes_first: bool = False


@dataclass(frozen=True, slots=True)
class _Fact:
    """A wording: what is said of a place, how it is asked for, for one, for two, and in other words."""

    sentence: str
    question: str
    joint_question: str
    paraphrase: str
    lead: str
    things: tuple[str, ...]


_FACTS = (
    _Fact(
        "The people of {place} drink hot {thing} on Mondays.",
        "What do the people of {place} drink on Mondays?",
        "What do the people of {place} and of {other} drink on Mondays?",
        "Which beverage is usual in {place} when the week begins?",
        "On Mondays the people of {place} drink hot",
        ("cider", "cocoa", "mead", "lemonade"),
    ),
    _Fact(
        "The ferry to {place} is painted {thing} every spring.",
        "Which colour is the ferry to {place} painted every spring?",
        "Which colours are the ferries to {place} and to {other} painted every spring?",
        "What does the boat that sails to {place} look like once winter is over?",
        "Every spring the ferry to {place} is painted",
        ("yellow", "purple", "green", "silver"),
    ),
    _Fact(
        "The mayor of {place} keeps a tame {thing} in the town hall.",
        "Which animal does the mayor of {place} keep in the town hall?",
        "Which animals do the mayors of {place} and of {other} keep in the town hall?",
        "What kind of pet has the head of the council of {place}?",
        "The mayor of {place} keeps a tame",
        ("raven", "hedgehog", "tortoise", "goat"),
    ),
    _Fact(
        "The winner of the race in {place} is given a basket of {thing}.",
        "What is the winner of the race in {place} given a basket of?",
        "What are the winners of the races in {place} and in {other} given baskets of?",
        "Which prize awaits whoever runs fastest in {place}?",
        "The winner of the race in {place} is given a basket of",
        ("plums", "cherries", "figs", "lemons"),
    ),
)
_PLACES = (
    "Aberlour Bergamo Cadiz Deventer Elsinore Falmouth Girona Haarlem Imatra Jaca Kilrush Lucca Modica "
    "Narva Oban Pirna Quimper Ravello Skagen Tavira Ullapool Visby Whitby Zadar"
).split()
_PLACES_OF_A_KIND = 4
_NUMBERS = ("two", "three", "four")


def ask(kind: str, seed: int) -> Question:
    """Return a question of one of `KINDS` or `HARD_KINDS`; another seed hides other sentences.

    Questions of different kinds can be about one text: no two of them tell of the same place.
    """
    maker = _MAKERS[kind]
    return maker(kind, random.Random(f"{kind} {seed}"))


def _pass_key(kind: str, chance: random.Random) -> Question:
    key = str(chance.randint(10_000, 99_999))
    return Question(
        kind=kind,
        sentences=(f"The secret pass key is {key}.",),
        text="What is the secret pass key mentioned in the text?",
        replies=(Reply("The secret pass key is", (key,)),),
        aside=f" Remember it: {key} is the pass key.",
    )


def _fact(kind: str, chance: random.Random) -> Question:
    fact, (place, _), (thing, _) = _drawn(kind, chance)
    text = fact.paraphrase if kind == "paraphrase" else fact.question
    return Question(
        kind=kind,
        sentences=(fact.sentence.format(place=place, thing=thing),),
        text=text.format(place=place),
        replies=(Reply(fact.lead.format(place=place), (thing,)),),
        comes_first=kind == "question first",
    )


def _two_facts(kind: str, chance: random.Random) -> Question:
    fact, (first, second), things = _drawn(kind, chance)
    text = fact.joint_question.format(place=first, other=second)
    if kind == "two questions":
        text = " ".join(fact.question.format(place=place) for place in (first, second))
    told = list(zip((first, second), things, strict=True))
    return Question(
        kind=kind,
        sentences=tuple(fact.sentence.format(place=place, thing=thing) for place, thing in told),
        text=text,
        replies=tuple(Reply(fact.lead.format(place=place), (thing,)) for place, thing in told),
    )


def _counting(kind: str, chance: random.Random) -> Question:
    number = chance.choice(_NUMBERS)
    count = _NUMBERS.index(number) + 2
    places = chance.sample(_places(kind), count)
    return Question(
        kind=kind,
        sentences=tuple(f"A red lantern hangs at the gate of {place}." for place in places),
        text="In the text, how many red lanterns hang at gates?",
        replies=(Reply("The number of red lanterns is", (number, str(count))),),
    )


_MAKERS: dict[str, Callable[[str, random.Random], Question]] = {
    "pass key": _pass_key,
    "fact": _fact,
    "two facts": _two_facts,
    "paraphrase": _fact,
    "two questions": _two_facts,
    "counting": _counting,
    "question first": _fact,
}


def _drawn(kind: str, chance: random.Random) -> tuple[_Fact, list[str], list[str]]:
    fact = chance.choice(_FACTS)
    return fact, chance.sample(_places(kind), 2), chance.sample(fact.things, 2)


def _places(kind: str) -> list[str]:
    """Those that only this kind tells of."""
    begin = (list(_MAKERS).index(kind) - 1) * _PLACES_OF_A_KIND
    return _PLACES[begin : begin + _PLACES_OF_A_KIND]

"""Questions about sentences that are hidden in a long text: what to hide, what to ask, what is right.

The facts are invented, so that no model knows them. Knows no model and no token.

Haystack: a long text in tokens, in which the sentences of questions are hidden, and whether they are
answered. Knows no policy.

WholePrompt: a prompt that a model holds exactly in all layers, and the scores that each would filter by.

A filter reads a prompt through its first layers alone; here one reading serves every layer, and the
prompt can be answered from, too. Knows no text."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.bindings.structs import ScoreRule
from lowtide.attention.dense import DenseController
from lowtide.attention.evaluation.divergence import extend, text_nll
from lowtide.attention.evaluation.passkeys import ANSWER_TOKENS, OPENING, Framing, continued
from lowtide.attention.policy import PassController
from lowtide.models.errors import BadOption
from lowtide.models.model import Model
from lowtide.models.tokenizer import Tokenizer, common_prefix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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


def _passkey(kind: str, chance: random.Random) -> Question:
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
    "pass key": _passkey,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenQuestion:
    """A prompt that asks `question`, of about `length` tokens with an answer.

    The first of its sentences lies at `depth`, a share of the length. `spans` are where they lie in
    `token_ids`, each a begin and an end; `leads` are the tokens that the replies begin with.
    """

    question: Question
    length: int
    depth: float
    token_ids: Sequence[int]
    spans: tuple[tuple[int, int], ...]
    leads: tuple[Sequence[int], ...]

    def __str__(self) -> str:
        return f"{self.question.kind} at {self.depth:.0%} of {self.length:,} tokens"


class Haystack:
    """The text is `token_ids`; `framing` puts a message into the model's chat template."""

    def __init__(self, tokenizer: Tokenizer, token_ids: Sequence[int], framing: Framing) -> None:
        self._tokenizer = tokenizer
        self._text = token_ids
        self._framing = framing

    def hide(
        self, questions: Sequence[tuple[Question, float]], length: int
    ) -> list[HiddenQuestion]:
        """Hide the sentences of all questions in one text, each question's first one at its depth, and
        return a prompt for each: what differs is the question alone, at the prompt's end.

        The sentences of a question after the first lie at even steps between it and the text's end.
        Questions that come first have beginnings of their own. Raises `BadOption` where there is no room.
        """
        frames = [self._frame(question) for question, _ in questions]
        newline = self._tokens("\n")
        sentences = [
            (
                depth + (1 - depth) * at / len(question.sentences),
                index,
                self._tokens(sentence),
                [*self._tokens(question.aside), *newline],
            )
            for index, (question, depth) in enumerate(questions)
            for at, sentence in enumerate(question.sentences)
        ]
        hidden = sum(len(newline) + len(told) + len(after) for _, _, told, after in sentences)
        leads = [lead for question, _ in questions for lead in self._leads(question)]
        longest = max(map(len, leads)) + ANSWER_TOKENS
        room = length - hidden - longest - max(len(start) + len(end) for start, end in frames)
        if not 0 < room <= len(self._text):
            raise BadOption(
                f"prompts of {length} tokens are wanted, of which questions take {length - room}, and the "
                f"text has {len(self._text)}: choose another context, or a longer text"
            )
        body, spans, taken = list[int](), [list[tuple[int, int]]() for _ in questions], 0
        for depth, index, told, after in sorted(sentences):
            until = int(room * depth)
            body += [*self._text[taken:until], *newline]
            spans[index].append((len(body), len(body) + len(told)))
            body += [*told, *after]
            taken = until
        body += self._text[taken:room]
        return [
            self._hidden(question, length, depth, frame, body, found)
            for (question, depth), frame, found in zip(questions, frames, spans, strict=True)
        ]

    def _hidden(
        self,
        question: Question,
        length: int,
        depth: float,
        frame: tuple[list[int], list[int]],
        body: list[int],
        spans: list[tuple[int, int]],
    ) -> HiddenQuestion:
        before, after = frame
        return HiddenQuestion(
            question=question,
            length=length,
            depth=depth,
            token_ids=[*before, *body, *after],
            spans=tuple((len(before) + begin, len(before) + end) for begin, end in spans),
            leads=self._leads(question),
        )

    def _frame(self, question: Question) -> tuple[list[int], list[int]]:
        """The tokens before the text, and those after it."""
        message = f"{OPENING}\0\n{question.text}"
        if question.comes_first:
            message = f"{question.text}\n{OPENING}\0"
        before, _, after = self._framing(message).partition("\0")
        start = self._tokenizer.encode(before, add_special=True, parse_special=True)
        return start, self._tokenizer.encode(after, add_special=False, parse_special=True)

    def _leads(self, question: Question) -> tuple[Sequence[int], ...]:
        return tuple(self._tokens(reply.lead) for reply in question.replies)

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, parse_special=False)


def is_answered(
    model: Model, controller: PassController, token_ids: Sequence[int], hidden: HiddenQuestion
) -> bool:
    """Whether the question is answered from a prompt of `token_ids`, its own or what is left of it.

    Every reply is begun with its lead and continued greedily, as the policy does. What the cache holds
    must be a beginning of the prompt, read exactly; afterwards it holds more.
    """
    for reply, lead in zip(hidden.question.replies, hidden.leads, strict=True):
        model.truncate(len(token_ids) - 1)
        if not reply.is_in(continued(model, controller, [*token_ids, *lead])):
            return False
    return True


class WholePrompt:
    """One prompt after another on one model; `rule` is how a layer scores."""

    def __init__(self, model: Model, host: AttentionKernels, rule: ScoreRule) -> None:
        self._model = model
        self._host = host
        self._rule = rule
        self._dense = DenseController(host)
        self.token_ids: Sequence[int] = ()

    def hold(self, token_ids: Sequence[int]) -> None:
        """Hold another prompt; what it has in common with the last one is not read again."""
        self._model.truncate(common_prefix(self.token_ids, token_ids))
        self.token_ids = token_ids
        extend(self._model, self._dense, self._head)

    def forget(self) -> None:
        """Hold nothing: others may use the model."""
        self._model.truncate(0)
        self.token_ids = ()

    def scores(self, layer: int) -> NDArray[np.float32] | None:
        """Return every token's score by a layer, shape (tokens,); None where its attention is not ours."""
        extend(self._model, self._dense, self._head)
        self._host.score_prompt(layer, self._rule, is_last=True)
        try:
            self._model.forward(self.token_ids[len(self._head) :])
            return self._host.prompt_scores(len(self.token_ids))
        finally:
            self._host.run_whole_passes()
            self._model.truncate(len(self._head))

    def answers(self, hidden: HiddenQuestion) -> bool:
        """Whether dense attention answers the question of the prompt that is held."""
        return is_answered(self._model, self._dense, self.token_ids, hidden)

    def nll(self, targets: Sequence[int]) -> float:
        """Return how unlikely dense attention makes what follows the prompt, in nats over all of it."""
        return text_nll(self._model, self._dense, self.token_ids, targets)

    @property
    def _head(self) -> Sequence[int]:
        """All but the rows that score."""
        return self.token_ids[: max(len(self.token_ids) - self._rule.num_rows, 0)]

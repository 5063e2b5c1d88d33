"""Questions about sentences that are hidden in a long text, for prompt filters such as GemFilter.

The facts are invented, so that no model knows them. `ask` makes a question, `Haystack` hides its sentences
in a text, and `is_answered` checks an answer. `WholePrompt` reads a prompt densely once, and then lets every
layer score its tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
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
from lowtide.models.text.tokenizer import Tokenizer, common_prefix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


KINDS = ("pass key", "fact", "two facts")
"""Questions that a filtered prompt must still answer."""
HARD_KINDS = ("paraphrase", "two questions", "counting", "question first")
"""Asked in other words, twice, for all places, or before the text: a filter may lose these."""
DEPTHS = (0.15, 0.5, 0.85)
"""Where sentences are hidden, as shares of the prompt."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The beginning of an answer, `lead`, and the words that may follow it: one of `accepted`."""

    lead: str
    accepted: tuple[str, ...]

    def is_in(self, text: str) -> bool:
        """Whether the text contains an accepted answer as a word."""
        return any(re.search(rf"\b{re.escape(answer)}\b", text) for answer in self.accepted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`sentences` to hide, the question about them, and the `replies`, all of which must be right.

    `aside` follows each of the sentences, and is not needed for an answer. `comes_first` puts the question
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
    """A sentence about a place, and how to ask about it: for one place, for two, and in other words."""

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
    """Return a question of one of `KINDS` or `HARD_KINDS`; `seed` selects the sentences.

    Questions of different kinds can share a text: they are never about the same place.
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
    pairs = list(zip((first, second), things, strict=True))
    return Question(
        kind=kind,
        sentences=tuple(fact.sentence.format(place=place, thing=thing) for place, thing in pairs),
        text=text,
        replies=tuple(Reply(fact.lead.format(place=place), (thing,)) for place, thing in pairs),
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
    """The places that belong to this kind alone."""
    begin = (list(_MAKERS).index(kind) - 1) * _PLACES_OF_A_KIND
    return _PLACES[begin : begin + _PLACES_OF_A_KIND]


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenQuestion:
    """A prompt that asks `question`, of about `length` tokens including an answer.

    The first of its sentences is at `depth`, a share of the length. `spans` are the begin and end of each
    sentence in `token_ids`; `leads` are the tokens that the replies begin with.
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
    """A long text to hide sentences in; `framing` puts a message into the model's chat template."""

    def __init__(self, tokenizer: Tokenizer, token_ids: Sequence[int], framing: Framing) -> None:
        self._tokenizer = tokenizer
        self._text = token_ids
        self._framing = framing

    def hide(
        self, questions: Sequence[tuple[Question, float]], length: int
    ) -> list[HiddenQuestion]:
        """Hide the sentences of all questions in one text, and return a prompt for each question.

        The first sentence of a question is at its depth, the others at even steps between that and the end
        of the text. The prompts differ only in the question at their end, or at their beginning if it comes
        first. Raises `BadOption` if the text or `length` is too short.
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
        hidden = sum(len(newline) + len(ids) + len(after) for _, _, ids, after in sentences)
        leads = [lead for question, _ in questions for lead in self._leads(question)]
        longest = max(map(len, leads)) + ANSWER_TOKENS
        room = length - hidden - longest - max(len(start) + len(end) for start, end in frames)
        if not 0 < room <= len(self._text):
            raise BadOption(
                f"prompts of {length} tokens leave {room} for text beside the questions, and the text has "
                f"{len(self._text)}: choose another context, or a longer text"
            )
        body, spans, taken = list[int](), [list[tuple[int, int]]() for _ in questions], 0
        for depth, index, ids, after in sorted(sentences):
            until = int(room * depth)
            body += [*self._text[taken:until], *newline]
            spans[index].append((len(body), len(body) + len(ids)))
            body += [*ids, *after]
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


def questions_in_one_text(
    haystack: Haystack, lengths: Sequence[int], seed: int
) -> Iterator[HiddenQuestion]:
    """Yield a question of each of `KINDS` at each of `DEPTHS` of prompts of every length.

    Three questions of different kinds share a text, each at another depth, so that the text is read once.
    `seed` selects the questions.
    """
    for index, length in enumerate(lengths):
        for turn in range(len(DEPTHS)):
            number = (seed * len(lengths) + index) * len(DEPTHS) + turn
            asked = [
                (ask(kind, number), DEPTHS[(at + turn) % len(DEPTHS)])
                for at, kind in enumerate(KINDS)
            ]
            yield from haystack.hide(asked, length)


def questions_alone(
    haystack: Haystack, lengths: Sequence[int], seed: int, kinds: Sequence[str] = KINDS
) -> Iterator[HiddenQuestion]:
    """Yield the questions of `kinds` as `questions_in_one_text` does, but each in a text of its own.

    The deepest come first, so that common prefixes are read once.
    """
    for index, length in enumerate(lengths):
        for turn, depth in reversed(list(enumerate(DEPTHS))):
            number = (seed * len(lengths) + index) * len(DEPTHS) + turn
            for kind in kinds:
                yield from haystack.hide([(ask(kind, number), depth)], length)


def are_retained(positions: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> bool:
    """Whether every token of `spans`, begin and end each, is among the retained positions."""
    retained = set(positions.tolist())
    return all(retained.issuperset(range(begin, end)) for begin, end in spans)


def is_answered(
    model: Model, controller: PassController, token_ids: Sequence[int], hidden: HiddenQuestion
) -> bool:
    """Whether the model answers the question from a prompt of `token_ids`, whole or filtered.

    Every reply begins with its lead and is continued greedily under the policy. The cache must hold a
    beginning of the prompt, read densely; afterwards it holds more of it.
    """
    for reply, lead in zip(hidden.question.replies, hidden.leads, strict=True):
        model.truncate(len(token_ids) - 1)
        if not reply.is_in(continued(model, controller, [*token_ids, *lead])):
            return False
    return True


class WholePrompt:
    """Reads prompts densely, one after another, and has layers score their tokens by `rule`."""

    def __init__(self, model: Model, kernels: AttentionKernels, rule: ScoreRule) -> None:
        self._model = model
        self._kernels = kernels
        self._rule = rule
        self._dense = DenseController(kernels)
        self.token_ids: Sequence[int] = ()

    def read(self, token_ids: Sequence[int]) -> None:
        """Read a prompt; the prefix that it shares with the last one is not read again."""
        self._model.truncate(common_prefix(self.token_ids, token_ids))
        self.token_ids = token_ids
        extend(self._model, self._dense, self._head)

    def clear(self) -> None:
        """Empty the model's cache."""
        self._model.truncate(0)
        self.token_ids = ()

    def scores(self, layer: int) -> NDArray[np.float32] | None:
        """Return a layer's scores (tokens,); None if lowtide's kernels do not run its attention."""
        extend(self._model, self._dense, self._head)
        self._kernels.score_prompt(layer, self._rule, is_last=True)
        try:
            self._model.forward(self.token_ids[len(self._head) :])
            return self._kernels.prompt_scores(len(self.token_ids))
        finally:
            self._kernels.run_whole_passes()
            self._model.truncate(len(self._head))

    def answers(self, hidden: HiddenQuestion) -> bool:
        """Whether dense attention answers the question of the prompt that was read."""
        return is_answered(self._model, self._dense, self.token_ids, hidden)

    def nll(self, targets: Sequence[int]) -> float:
        """Return the negative log likelihood of what follows the prompt, summed, in nats."""
        return text_nll(self._model, self._dense, self.token_ids, targets)

    @property
    def _head(self) -> Sequence[int]:
        """All tokens but the last ones, whose queries score."""
        return self.token_ids[: max(len(self.token_ids) - self._rule.num_tokens, 0)]

"""Haystack: a long text in tokens, in which the sentences of questions are hidden, and whether they are
answered. Knows no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.attention.needles import ANSWER_TOKENS, OPENING, Framing, continued
from lowtide.attention.policy import Steering
from lowtide.attention.questions import Question
from lowtide.models.errors import BadOption
from lowtide.models.model import Model
from lowtide.models.tokenizer import Tokenizer


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
    model: Model, steering: Steering, token_ids: Sequence[int], hidden: HiddenQuestion
) -> bool:
    """Whether the question is answered from a prompt of `token_ids`, its own or what is left of it.

    Every reply is begun with its lead and continued greedily, as the policy does. What the cache holds
    must be a beginning of the prompt, read exactly; afterwards it holds more.
    """
    for reply, lead in zip(hidden.question.replies, hidden.leads, strict=True):
        model.truncate(len(token_ids) - 1)
        if not reply.is_in(continued(model, steering, [*token_ids, *lead])):
            return False
    return True

"""ReasonFirst: a format whose answers begin with reasoning, free text of a bounded length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import text, whole_number
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.formats import OutputFormat
from lowtide.runtime.structured.reasoning.markers import (
    END_OF_THINK,
    END_TEXT,
    THINK,
    Markers,
    finder_of,
)
from lowtide.runtime.structured.reasoning.reason_constraint import ReasonConstraint
from lowtide.runtime.structured.response_format import as_format
from lowtide.runtime.structured.vocabulary import TokenVocabulary

MAX_END_BYTES = 64
"""Most bytes of the text that ends the reasoning. Each may need a mask, and the plan has room for 64 masks."""
DEFAULT_TOKENS = 256


@dataclass(frozen=True, init=False)
class ReasonFirst(OutputFormat):
    """Free text of at most `max_tokens` tokens, what ends it, and then an answer in `format`.

    The reasoning ends with `end`: by default `</think>` where the vocabulary has a token for it (then it begins with
    `<think>`), else `Answer:`. The model may write it sooner; it is written for it otherwise.
    """

    format: OutputFormat
    max_tokens: int
    end: str | None

    def __init__(
        self, format: Any, max_tokens: int = DEFAULT_TOKENS, *, end: str | None = None
    ) -> None:
        found = as_format(format)
        if found is None:
            raise BadOption(
                "the format of an answer behind reasoning asks for nothing; pass a schema or another format"
            )
        if (
            end is not None
            and not 0 < len(text(option("reason_end"), end).encode()) <= MAX_END_BYTES
        ):
            raise BadOption(
                f"{option('reason_end')} has {len(end.encode())} bytes; it must have 1 to {MAX_END_BYTES}"
            )
        object.__setattr__(self, "format", found)
        object.__setattr__(
            self, "max_tokens", whole_number(option("reason"), max_tokens, 1, 1_000_000)
        )
        object.__setattr__(self, "end", end)

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer."""
        markers = Markers(vocabulary, self.end)
        return ReasonConstraint(self.format.compile(vocabulary), markers, self.max_tokens)

    @property
    def needs_grammar(self) -> bool:
        """Whether the answer needs a grammar."""
        return self.format.needs_grammar

    @property
    def grammar_bytes(self) -> int:
        """Bytes of the grammar of the answer."""
        return self.format.grammar_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the table that finds the marker, and of the answer's format."""
        return finder_of(self.end or END_TEXT).table.num_bytes + self.format.num_bytes

    def parse(self, answer: str) -> Any:
        """Return the value that an answer without its reasoning stands for."""
        return self.format.parse(answer)

    def reasoning(self, before: str) -> str:
        """Return the reasoning alone, of the text before the answer."""
        ends = (self.end,) if self.end is not None else (END_OF_THINK, END_TEXT)
        found = before.strip()
        for end in ends:
            if found.endswith(end.strip()):
                found = found.removesuffix(end.strip())
                break
        if self.end is None:
            found = found.strip().removeprefix(THINK)
        return found.strip()

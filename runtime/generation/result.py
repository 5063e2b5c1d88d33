"""What a generation returns: one chunk for each token, or the whole result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowtide.runtime.generation.logprobs import TokenLogprob
from lowtide.runtime.generation.statistics import Statistics
from lowtide.runtime.profiling.retention_map import RetainedSpan

if TYPE_CHECKING:
    from lowtide.runtime.structured.formats import OutputFormat


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """The text that one sampled token adds to an answer."""

    text: str
    """New text. Empty while a character is incomplete or the text could be the start of a stop text."""
    token_id: int | None
    """The sampled token; None for the model's own end-of-text token."""
    finish_reason: str | None
    """Set on the last chunk only: "stop", "length", "context" (the context is full) or "memory" (the budget
    has no room for another token; the tokens so far are kept)."""
    stats: Statistics
    """Counts and times up to this token; complete on the last chunk."""
    retained: tuple[RetainedSpan, ...] = ()
    """With `explain=True`, on the last chunk: the spans of the prompt that GemFilter retained."""
    logprobs: TokenLogprob | None = None
    """With `logprobs`: the token's log probability; None for the end of text, and where a constraint closed the
    answer."""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished answer."""

    text: str
    """The whole text, without the stop text that ended it."""
    token_ids: tuple[int, ...]
    """The sampled tokens, without the end-of-text token."""
    finish_reason: str
    """Why it ended; the same values as in `GenerationChunk`."""
    stats: Statistics
    """What the whole answer cost."""
    retained: tuple[RetainedSpan, ...] = ()
    """With `explain=True`: the spans of the prompt that GemFilter retained."""
    parsed: Any = None
    """With a constraint, the value that the text stands for: parsed JSON, or an object of the class that was passed.
    None where `not_parsed_reason` says why."""
    not_parsed_reason: str | None = None
    """Why `parsed` is None; None where the text was parsed."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """With `logprobs`: the log probabilities of the sampled tokens; tokens that close a constrained answer have
    none."""

    reasoning: str | None = None
    """With `ReasonFirst`: what the model wrote before its answer, without markers."""
    answer_start: int = 0
    """Where the answer begins in `text`, behind the reasoning."""

    @property
    def answer(self) -> str:
        """The text without its reasoning."""
        return self.text[self.answer_start :]

    @property
    def structured(self) -> dict[str, Any] | None:
        """With a constraint: how it was enforced, and whether the answer is complete and was closed."""
        return self.stats.structured

    @classmethod
    def of(cls, chunks: Iterable[GenerationChunk], response_format: Any = None) -> GenerationResult:
        """Run `chunks` to the end and return them as one result.

        Where their format is passed again, the result has `parsed`.
        """
        collected = list(chunks)
        last = collected[-1]
        text = "".join(chunk.text for chunk in collected)
        before = _text_before_answer(collected)
        found = None if response_format is None else _format(response_format)
        parsed, reason = _parsed(text[len(before or "") :], last, found, response_format)
        return cls(
            text=text,
            token_ids=tuple(c.token_id for c in collected if c.token_id is not None),
            finish_reason=last.finish_reason or "stop",
            stats=last.stats,
            retained=last.retained,
            parsed=parsed,
            not_parsed_reason=reason,
            logprobs=_logprobs(collected),
            reasoning=before if found is None or before is None else found.reasoning(before),
            answer_start=len(before or ""),
        )


def _format(response_format: Any) -> OutputFormat | None:
    from lowtide.runtime.structured.response_format import as_format

    return as_format(response_format)


def _text_before_answer(chunks: Sequence[GenerationChunk]) -> str | None:
    """Return the text of the reasoning with its markers; None where the answer has none."""
    left = (chunks[-1].stats.structured or {}).get("reasoning_tokens")
    if left is None:
        return None
    texts = []
    for chunk in chunks:
        if left > 0:
            texts.append(chunk.text)
        left -= chunk.token_id is not None
    return "".join(texts)


def _parsed(
    text: str, last: GenerationChunk, found: OutputFormat | None, response_format: Any
) -> tuple[Any, str | None]:
    """Return the value of an answer, and why there is none."""
    if response_format is None:
        return None, "no response_format was asked for"
    if not (last.stats.structured or {}).get("complete"):
        return None, (
            f"the answer is not complete (it ended for {last.finish_reason!r}): raise max_tokens or the context"
        )
    try:
        return (None if found is None else found.parse(text)), None
    except Exception as error:  # the caller's own class may refuse the value
        return None, f"the type of the answer refuses it ({type(error).__name__}: {error})"


def _logprobs(chunks: list[GenerationChunk]) -> tuple[TokenLogprob, ...] | None:
    return tuple(chunk.logprobs for chunk in chunks if chunk.logprobs is not None) or None

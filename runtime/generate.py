"""THE loop: prefill, sample, yield, decode. Knows no budget, no template and no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowtide.attention.graph_hook import HookCounts
from lowtide.models.model import Model
from lowtide.models.tokenizer import TextStream
from lowtide.runtime.answer_meter import AnswerMeter
from lowtide.runtime.options import GenerationOptions
from lowtide.runtime.profiler import SILENT, Profiler
from lowtide.runtime.prompt_heat import Passage
from lowtide.runtime.sampling import Sampler
from lowtide.runtime.session import Session
from lowtide.runtime.speculate import Speculator
from lowtide.runtime.statistics import Statistics
from lowtide.runtime.stopping import StopMatcher
from lowtide.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from lowtide.models.model import Logits


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer as it appears.

    `text` may be empty (half a character, or the start of a stop text). `token_id` is None where the
    model ended the answer. The last piece alone has a `finish_reason`: "stop", "length", "context" or
    "memory" (the budget has no room for another token; what was generated is kept); where that was asked
    for it has `kept`, the passages of a long prompt that were read by every layer.
    """

    text: str
    token_id: int | None
    finish_reason: str | None
    stats: Statistics
    kept: tuple[Passage, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What to answer: the prompt's tokens, when the caller asked, and what was left out of it."""

    token_ids: Sequence[int]
    asked_at: float
    dropped_tokens: int = 0
    dropped_messages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the statistics tell of the runtime around the loop.

    `attention` is the policy in words; `hook_counts` is asked when needed: None where
    nothing is hooked. `watchdog` is asked before each step whether the budget is passed. Where there is a
    `speculator`, it decodes. `batch` tells of answers that are generated together.
    """

    budget_bytes: int
    planned_bytes: int
    attention: str
    hook_counts: Callable[[], HookCounts | None]
    watchdog: Watchdog
    packed_tensors: int = 0
    unpacked_reason: str | None = None
    speculator: Speculator | None = None
    batch: dict[str, Any] | None = None


def generate(
    model: Model,
    session: Session,
    prompt: Prompt,
    options: GenerationOptions,
    facts: RunFacts,
    profiler: Profiler = SILENT,
) -> Iterator[Piece]:
    """Yield the answer to `prompt` token by token; closing the iterator leaves the session usable.

    With a speculator in `facts`, logits may come from rows that it had verified; the tokens are the same.
    """
    sampler = Sampler(options)
    stream, stops = TextStream(model.tokenizer), StopMatcher(options.stop)
    meter, speculator = AnswerMeter(model, prompt, sampler.seed, facts), facts.speculator
    token_ids = session.shortened(prompt.token_ids)
    meter.kept_tokens = len(token_ids)
    restored = session.restore(token_ids)
    meter.reused_tokens = session.rewind_to(token_ids)
    meter.restored_tokens = meter.reused_tokens if restored else 0
    session.admit(len(token_ids))
    logits = prefill(session, token_ids[meter.reused_tokens :], model.max_rows)
    meter.prefilled()
    if speculator is not None:
        speculator.begin()
    while True:
        with profiler.span("sampling"):
            token_id = sampler.choose(logits, session.token_ids)
        if model.tokenizer.is_end(token_id):
            yield Piece(stops.rest(), None, "stop", meter.final())
            return
        meter.sampled()
        text, stopped = stops.push(stream.push(token_id))
        finish_reason = _finish_reason(stopped, meter.generated_tokens, session, options)
        if finish_reason is None and facts.watchdog.is_over():
            finish_reason = "memory"
        if finish_reason is not None:
            rest = "" if stopped else stops.rest()
            yield Piece(text + rest, token_id, finish_reason, meter.final())
            return
        yield Piece(text, token_id, None, meter.statistics())
        logits = speculator.decode(session, token_id) if speculator else session.decode((token_id,))


def prefill(session: Session, token_ids: Sequence[int], max_rows: int) -> Logits:
    """Compute the tokens in passes of at most `max_rows` and return the last one's logits."""
    for start in range(0, len(token_ids), max_rows):
        logits = session.append(token_ids[start : start + max_rows])
    return logits


def _finish_reason(
    stopped: bool, generated_tokens: int, session: Session, options: GenerationOptions
) -> str | None:
    if stopped:
        return "stop"
    if generated_tokens == options.max_tokens:
        return "length"
    if session.is_full:
        return "context"
    return None if session.has_room else "memory"

"""THE loop: prefill, sample, yield, decode. Knows no budget, no template and no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowtide.attention.graph_hook import HookCounts
from lowtide.memory.meter import read_process_memory
from lowtide.models.model import Model
from lowtide.models.tokenizer import TextStream
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
    `speculator`, it decodes.
    """

    budget_bytes: int
    planned_bytes: int
    attention: str
    hook_counts: Callable[[], HookCounts | None]
    watchdog: Watchdog
    packed_tensors: int = 0
    unpacked_reason: str | None = None
    speculator: Speculator | None = None


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
    meter, speculator = _Meter(model, prompt, sampler.seed, facts), facts.speculator
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


class _Meter:
    """Takes the times and counts of one answer."""

    def __init__(self, model: Model, prompt: Prompt, seed: int, facts: RunFacts) -> None:
        self._model = model
        self._prompt = prompt
        self._seed = seed
        self._facts = facts
        self.reused_tokens = self.restored_tokens = 0
        self.kept_tokens = len(prompt.token_ids)
        self.generated_tokens = 0
        self._prefill_s = 0.0
        self._layers_ours = 0
        self._at_prompt: HookCounts | None = None
        self._first_token_s: float | None = None
        self._first_token_at = 0.0
        self._now = self._started_at = time.perf_counter()

    def prefilled(self) -> None:
        self._now = time.perf_counter()
        self._prefill_s = self._now - self._started_at
        self._at_prompt = self._facts.hook_counts()
        self._layers_ours = self._at_prompt.layers_ours if self._at_prompt else 0

    def sampled(self) -> None:
        self._now = time.perf_counter()
        self.generated_tokens += 1
        if self._first_token_s is None:
            self._first_token_at = self._now
            self._first_token_s = self._now - self._prompt.asked_at

    def statistics(self) -> Statistics:
        num_tokens = len(self._prompt.token_ids)
        return Statistics(
            prompt_tokens=num_tokens + self._prompt.dropped_tokens,
            reused_tokens=self.reused_tokens,
            restored_tokens=self.restored_tokens,
            kept_tokens=self.kept_tokens,
            dropped_tokens=self._prompt.dropped_tokens,
            dropped_messages=self._prompt.dropped_messages,
            generated_tokens=self.generated_tokens,
            prefill_s=self._prefill_s,
            decode_s=self._now - self._first_token_at if self.generated_tokens else 0.0,
            time_to_first_token_s=self._first_token_s,
            layers_ours=self._layers_ours,
            layers=self._model.spec.num_layers,
            attention=self._facts.attention,
            packed_tensors=self._facts.packed_tensors,
            unpacked_reason=self._facts.unpacked_reason,
            seed=self._seed,
            budget_bytes=self._facts.budget_bytes,
            planned_bytes=self._facts.planned_bytes,
            trims=self._facts.watchdog.trims,
        )

    def final(self) -> Statistics:
        return replace(
            self.statistics(),
            peak_rss_bytes=read_process_memory().peak_bytes,
            attended_share=self._attended_share(),
            speculation=self._facts.speculator.statistics() if self._facts.speculator else None,
        )

    def _attended_share(self) -> float | None:
        """Return how much of the cache decoding attended to since the prompt."""
        now = self._facts.hook_counts()
        if now is None or self._at_prompt is None:
            return None
        held = now.keys_held - self._at_prompt.keys_held
        return (now.keys_read - self._at_prompt.keys_read) / held if held else None

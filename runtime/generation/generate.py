"""THE loop: prefill, sample, yield, decode. Knows no budget, no template and no terminal.

StopMatcher: ends an answer at a stop text, even one that arrives over several tokens.

Knows no tokens. Text that could be the beginning of a stop text is held back until it is clear.

StatsRecorder: takes the times and counts of one answer. Knows no loop.

GenerationResult: a whole answer as a value. Knows no runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowtide.attention.bindings.counts import KernelCounts
from lowtide.memory.process import read_process_memory
from lowtide.models.model import Model
from lowtide.models.tokenizer import TextStream
from lowtide.runtime.generation.sampling import Sampler
from lowtide.runtime.generation.statistics import Statistics
from lowtide.runtime.generation.watchdog import Watchdog
from lowtide.runtime.kv.session import KVSession
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.profiling.profiler import SILENT, Profiler
from lowtide.runtime.profiling.retention_map import RetainedSpan
from lowtide.runtime.speculation.speculator import Speculator

if TYPE_CHECKING:
    from lowtide.models.model import Logits


class StopMatcher:
    """Passes text through until one of `stops` appears in it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that may be shown now, and whether a stop text ended it."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown, False

    def rest(self) -> str:
        """Return what was held back, when no more text comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )


class StatsRecorder:
    """Takes the times and counts of one answer."""

    def __init__(self, model: Model, prompt: Prompt, seed: int, facts: GenerationContext) -> None:
        self._model = model
        self._prompt = prompt
        self._seed = seed
        self._facts = facts
        self.reused_tokens = self.restored_tokens = 0
        self.retained_tokens = len(prompt.token_ids)
        self.generated_tokens = 0
        self._prefill_s = 0.0
        self._layers_ours = 0
        self._at_prompt: KernelCounts | None = None
        self._first_token_s: float | None = None
        self._first_token_at = 0.0
        self._now = self._started_at = time.perf_counter()

    def prefilled(self) -> None:
        """The prompt's last pass is done."""
        self._now = time.perf_counter()
        self._prefill_s = self._now - self._started_at
        self._at_prompt = self._facts.kernel_counts()
        self._layers_ours = self._at_prompt.layers_native if self._at_prompt else 0

    def sampled(self) -> None:
        """A token was sampled."""
        self._now = time.perf_counter()
        self.generated_tokens += 1
        if self._first_token_s is None:
            self._first_token_at = self._now
            self._first_token_s = self._now - self._prompt.asked_at

    def statistics(self) -> Statistics:
        """Return what is known while the answer goes on."""
        num_tokens = len(self._prompt.token_ids)
        return Statistics(
            prompt_tokens=num_tokens + self._prompt.dropped_tokens,
            reused_tokens=self.reused_tokens,
            restored_tokens=self.restored_tokens,
            retained_tokens=self.retained_tokens,
            dropped_tokens=self._prompt.dropped_tokens,
            dropped_messages=self._prompt.dropped_messages,
            generated_tokens=self.generated_tokens,
            prefill_s=self._prefill_s,
            decode_s=self._now - self._first_token_at if self.generated_tokens else 0.0,
            time_to_first_token_s=self._first_token_s,
            layers_native=self._layers_ours,
            layers=self._model.spec.num_layers,
            attention=self._facts.attention,
            repacked_tensors=self._facts.repacked_tensors,
            not_repacked_reason=self._facts.not_repacked_reason,
            seed=self._seed,
            budget_bytes=self._facts.budget_bytes,
            planned_bytes=self._facts.planned_bytes,
            batch=self._facts.batch,
            trims=self._facts.watchdog.trims,
        )

    def final(self) -> Statistics:
        """Return everything, at the end of the answer."""
        return replace(
            self.statistics(),
            peak_rss_bytes=read_process_memory().peak_bytes,
            attended_share=self._attended_share(),
            scores=self._scores(),
            speculation=self._facts.speculator.statistics() if self._facts.speculator else None,
        )

    def _attended_share(self) -> float | None:
        """Return how much of the cache decoding attended to since the prompt."""
        now = self._facts.kernel_counts()
        if now is None or self._at_prompt is None:
            return None
        held = now.keys_held - self._at_prompt.keys_held
        return (now.keys_read - self._at_prompt.keys_read) / held if held else None

    def _scores(self) -> dict[str, Any] | None:
        """Return what the scores of decoding cost since the prompt; None where no key was a state."""
        now = self._facts.kernel_counts()
        if now is None or self._at_prompt is None:
            return None
        cost = now.scores - self._at_prompt.scores
        return cost.to_dict() if cost.channels_behind else None


@dataclass(frozen=True, slots=True)
class GenerationChunk:
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
    kept: tuple[RetainedSpan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What to answer: the prompt's tokens, when the caller asked, and what was left out of it."""

    token_ids: Sequence[int]
    asked_at: float
    dropped_tokens: int = 0
    dropped_messages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationContext:
    """What the statistics tell of the runtime around the loop.

    `attention` is the policy in words; `kernel_counts` is asked when needed: None where
    nothing is hooked. `watchdog` is asked before each step whether the budget is passed. Where there is a
    `speculator`, it decodes. `batch` tells of answers that are generated together.
    """

    budget_bytes: int
    planned_bytes: int
    attention: str
    kernel_counts: Callable[[], KernelCounts | None]
    watchdog: Watchdog
    repacked_tensors: int = 0
    not_repacked_reason: str | None = None
    speculator: Speculator | None = None
    batch: dict[str, Any] | None = None


def generate(
    model: Model,
    session: KVSession,
    prompt: Prompt,
    options: SamplingParams,
    facts: GenerationContext,
    profiler: Profiler = SILENT,
) -> Iterator[GenerationChunk]:
    """Yield the answer to `prompt` token by token; closing the iterator leaves the session usable.

    With a speculator in `facts`, logits may come from rows that it had verified; the tokens are the same.
    """
    sampler = Sampler(options)
    stream, stops = TextStream(model.tokenizer), StopMatcher(options.stop)
    meter, speculator = StatsRecorder(model, prompt, sampler.seed, facts), facts.speculator
    token_ids = session.shortened(prompt.token_ids)
    meter.retained_tokens = len(token_ids)
    restored = session.restore(token_ids)
    meter.reused_tokens = session.truncate_to_prefix(token_ids)
    meter.restored_tokens = meter.reused_tokens if restored else 0
    session.admit(len(token_ids))
    logits = prefill(session, token_ids[meter.reused_tokens :], model.batch_size)
    meter.prefilled()
    if speculator is not None:
        speculator.begin()
    while True:
        with profiler.span("sampling"):
            token_id = sampler.choose(logits, session.token_ids)
        if model.tokenizer.is_end(token_id):
            yield GenerationChunk(stops.rest(), None, "stop", meter.final())
            return
        meter.sampled()
        text, stopped = stops.push(stream.push(token_id))
        finish_reason = _finish_reason(stopped, meter.generated_tokens, session, options)
        if finish_reason is None and facts.watchdog.is_over():
            finish_reason = "memory"
        if finish_reason is not None:
            rest = "" if stopped else stops.rest()
            yield GenerationChunk(text + rest, token_id, finish_reason, meter.final())
            return
        yield GenerationChunk(text, token_id, None, meter.statistics())
        logits = speculator.decode(session, token_id) if speculator else session.decode((token_id,))


def prefill(session: KVSession, token_ids: Sequence[int], batch_size: int) -> Logits:
    """Compute the tokens in passes of at most `batch_size` and return the last one's logits."""
    for start in range(0, len(token_ids), batch_size):
        logits = session.append(token_ids[start : start + batch_size])
    return logits


def _finish_reason(
    stopped: bool, generated_tokens: int, session: KVSession, options: SamplingParams
) -> str | None:
    if stopped:
        return "stop"
    if generated_tokens == options.max_tokens:
        return "length"
    if session.is_full:
        return "context"
    return None if session.has_room else "memory"


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer: its text, the tokens that were sampled, why it ended, what it cost; see `GenerationChunk`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stats: Statistics
    kept: tuple[RetainedSpan, ...] = ()

    @classmethod
    def of(cls, pieces: Iterator[GenerationChunk]) -> GenerationResult:
        """Run `pieces` to the end and put them together."""
        collected = list(pieces)
        last = collected[-1]
        return cls(
            text="".join(piece.text for piece in collected),
            token_ids=tuple(p.token_id for p in collected if p.token_id is not None),
            finish_reason=last.finish_reason or "stop",
            stats=last.stats,
            kept=last.kept,
        )

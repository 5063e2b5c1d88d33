"""The state of one sequence that is being generated: sampling, stop texts, finish reason and statistics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowtide.attention.bindings.counts import KernelCounts
from lowtide.memory.process import read_process_memory
from lowtide.models.model import Model
from lowtide.models.text.tokenizer import TextStream
from lowtide.runtime.generation.logprobs import LogprobMeter, TokenLogprob
from lowtide.runtime.generation.result import GenerationChunk
from lowtide.runtime.generation.statistics import Statistics
from lowtide.runtime.generation.watchdog import Watchdog
from lowtide.runtime.generation.weighted import sampler_of
from lowtide.runtime.kv.cache import CachedPrompt, KVCache
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.profiling.retention_map import RetainedSpan
from lowtide.runtime.speculation.controller import SpeculationController
from lowtide.runtime.structured.answer import ConstrainedAnswer, NoLegalToken

if TYPE_CHECKING:
    from lowtide.models.model import Logits


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A prompt that fits the context, and how to continue it.

    `asked_at` is the caller's time (`time.perf_counter`); `dropped_tokens` and `dropped_messages` were left
    out of the prompt. `answer` is what the answer must look like; None for any text. Requests of one `owner` share what
    the cache holds.
    """

    token_ids: Sequence[int]
    params: SamplingParams
    asked_at: float
    dropped_tokens: int = 0
    dropped_messages: int = 0
    answer: ConstrainedAnswer | None = None
    owner: str = ""

    def max_kv_tokens(self, context: int) -> int:
        """Return how many tokens the sequence may have in the cache; the last sampled one is not computed."""
        if self.params.max_tokens is None:
            return context
        return min(len(self.token_ids) + self.params.max_tokens - 1, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationContext:
    """What a generation needs to know of the loaded model around it.

    `attention` describes the policy, `kernels` who computes attention and matmuls. `kernel_counts` returns the
    counters of lowtide's kernels, None where the engine's own run. `watchdog` is asked after each pass whether the
    process is over its budget. `speculation` drafts tokens; None where speculation is off. `batch` describes the
    batch for the statistics.
    `threads` tells how many threads computed the last pass, None where that is unknown. A sequence has at most
    `max_tokens` tokens. `retained_spans` returns what GemFilter retained of the last prompt.
    """

    budget_bytes: int
    planned_bytes: int
    attention: str
    kernel_counts: Callable[[], KernelCounts | None]
    watchdog: Watchdog
    kernels: dict[str, str] | None = None
    repacked_tensors: int = 0
    not_repacked_reason: str | None = None
    speculation: SpeculationController | None = None
    batch: dict[str, Any] | None = None
    max_tokens: int
    retained_spans: Callable[[], Sequence[RetainedSpan]] = tuple
    threads: Callable[[], int | None] = lambda: None


class StopMatcher:
    """Ends a text at the first of `stops`, also where that arrives over several tokens.

    Text that could be the start of a stop text is held back until that is clear.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that may be shown now, and whether a stop text was found behind it."""
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
        """Return the text that was held back; the text has ended."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a start of `stop`."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )


class StatsRecorder:
    """Measures one sequence; the clock starts when its prompt is in the cache's hands."""

    def __init__(
        self,
        request: GenerationRequest,
        num_layers: int,
        seed: int,
        context: GenerationContext,
    ) -> None:
        self._index = 0
        self._request = request
        self._num_layers = num_layers
        self._seed = seed
        self._context = context
        self._prompt = CachedPrompt(token_ids=request.token_ids, num_cached=0)
        self.generated_tokens = 0
        self._prefill_s: float | None = None
        self._layers_native = 0
        self._counts_at_prefill: KernelCounts | None = None
        self._first_token_s: float | None = None
        self._first_token_at = 0.0
        self._now = self._started_at = time.perf_counter()

    def begin(self, index: int) -> None:
        """Start the clock; `index` is the sequence's number in the cache."""
        self._index = index
        self._now = self._started_at = time.perf_counter()

    def record_prompt(self, prompt: CachedPrompt) -> None:
        """Record how much of the prompt was cached and retained."""
        self._prompt = prompt

    def record_prefill(self) -> None:
        """Record the end of the prompt's last pass; later calls do nothing."""
        if self._prefill_s is not None:
            return
        self._now = time.perf_counter()
        self._prefill_s = self._now - self._started_at
        counts = self._counts_at_prefill = self._context.kernel_counts()
        self._layers_native = counts.layers_native if counts else 0

    def record_token(self) -> None:
        """Record a sampled token."""
        self._now = time.perf_counter()
        self.generated_tokens += 1
        if self._first_token_s is None:
            self._first_token_at = self._now
            self._first_token_s = self._now - self._request.asked_at

    def statistics(self) -> Statistics:
        """Return what is known while the generation goes on."""
        request, context, prompt = self._request, self._context, self._prompt
        return Statistics(
            prompt_tokens=len(request.token_ids) + request.dropped_tokens,
            reused_tokens=prompt.num_reused,
            restored_tokens=prompt.num_restored,
            retained_tokens=len(prompt.token_ids),
            dropped_tokens=request.dropped_tokens,
            dropped_messages=request.dropped_messages,
            generated_tokens=self.generated_tokens,
            prefill_s=self._prefill_s or 0.0,
            decode_s=self._now - self._first_token_at if self.generated_tokens else 0.0,
            time_to_first_token_s=self._first_token_s,
            layers_native=self._layers_native,
            layers=self._num_layers,
            attention=context.attention,
            kernels=context.kernels,
            repacked_tensors=context.repacked_tensors,
            not_repacked_reason=context.not_repacked_reason,
            seed=self._seed,
            budget_bytes=context.budget_bytes,
            planned_bytes=context.planned_bytes,
            batch=context.batch,
            trims=context.watchdog.trims,
            threads=context.threads(),
        )

    def final(self) -> Statistics:
        """Return the complete statistics at the end of the generation."""
        speculation, answer = self._context.speculation, self._request.answer
        return replace(
            self.statistics(),
            peak_rss_bytes=read_process_memory().peak_bytes,
            attended_share=self._attended_share(),
            scores=self._scores(),
            speculation=speculation.statistics(self._index) if speculation else None,
            structured=answer.statistics() if answer else None,
        )

    def _attended_share(self) -> float | None:
        """Return which share of the cached keys decoding attended to."""
        now, before = self._context.kernel_counts(), self._counts_at_prefill
        if now is None or before is None:
            return None
        held = now.keys_visible - before.keys_visible
        return (now.keys_read - before.keys_read) / held if held else None

    def _scores(self) -> dict[str, Any] | None:
        """Return the cost of the scores since the prefill; None where no block of channels was merged."""
        now, before = self._context.kernel_counts(), self._counts_at_prefill
        if now is None or before is None:
            return None
        cost = now.scores - before.scores
        return cost.to_dict() if cost.channels_merged else None


class GenerationState:
    """One sequence of the decode loop, a request in progress, which its owner knows by `key`.

    `index` is its number in the cache while it runs. `token_ids` are the prompt as the cache holds it and the sampled
    tokens, which the penalties look back on. The first `num_computed` of them are in the cache: the others are the rest
    of the prompt and what the answer must begin with, or the token that was sampled last and forced text behind it.
    Where an answer is verified at its end, its chunks are `held_back` until it stands.
    """

    def __init__(
        self, key: Hashable, request: GenerationRequest, model: Model, context: GenerationContext
    ) -> None:
        self.key = key
        self.index = 0
        self.request = request
        self.held_back: list[GenerationChunk] = []
        self._model, self._context = model, context
        self.token_ids: list[int] = []
        self.num_computed = 0
        self.is_finished = False
        self._num_prompt = self._read_until = 0
        self._forced = deque[int]()
        self._is_end = model.tokenizer.is_end
        self._sampler = sampler_of(request.params)
        if request.answer is not None:
            request.answer.begin(request.token_ids)
        num_top = request.params.logprobs
        self._meter = (
            None if num_top is None else LogprobMeter(num_top, model.tokenizer.token_bytes)
        )
        self._logprobs: TokenLogprob | None = None
        self._stream = TextStream(model.tokenizer)
        self._stops = StopMatcher(request.params.stop)
        self._stats = StatsRecorder(request, model.spec.num_layers, self._sampler.seed, context)

    @property
    def max_kv_tokens(self) -> int:
        """How many tokens the sequence may have in the cache."""
        return self.request.max_kv_tokens(self._context.max_tokens)

    def begin(self, cache: KVCache, index: int) -> None:
        """Take number `index` in the cache; find out what it holds of the prompt, and what is left to compute."""
        self.index = index
        self._stats.begin(index)
        request = self.request
        prompt = cache.add(index, request.token_ids, self.max_kv_tokens, request.owner)
        self._stats.record_prompt(prompt)
        self.token_ids = list(prompt.token_ids)
        self.num_computed, self._num_prompt = prompt.num_cached, len(prompt.token_ids)
        self._read_until = self._num_prompt
        self._force()
        self._read_ahead(cache)

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens of the prompt, or of forced text, are left to compute."""
        return self.num_computed < self._read_until

    @property
    def num_unread(self) -> int:
        """How many tokens of the prompt, or of forced text, are left to compute."""
        return max(self._read_until - self.num_computed, 0)

    def next_chunk(self, max_tokens: int) -> list[int]:
        """Return up to `max_tokens` tokens of the prompt or of forced text, to be computed now."""
        start = self.num_computed
        self.num_computed = min(start + max_tokens, self._read_until)
        return self.token_ids[start : self.num_computed]

    @property
    def answer(self) -> ConstrainedAnswer | None:
        """What the answer must look like; None for any text."""
        return self.request.answer

    def holds_back(self, chunk: GenerationChunk) -> bool:
        """Keep a chunk of an answer that is verified at its end; return whether it is one."""
        is_verified_last = self.answer is not None and self.answer.is_verified_last
        if is_verified_last:
            self.held_back.append(chunk)
        return is_verified_last

    def next_attempt(self) -> GenerationState | None:
        """Return another attempt where the answer, which has ended, is wrong; None where it stands.

        Raises `ConstraintFailed` where no other is tried.
        """
        if self.answer is None or not self.answer.is_verified_last:
            return None
        again = self.answer.retry()
        if again is None:
            return None
        request = replace(self.request, answer=again)
        return GenerationState(self.key, request, self._model, self._context)

    def attempt_after(self, error: Exception) -> GenerationState | None:
        """Return another attempt after one without a legal token, which has failed; raise any other error."""
        is_attempt = self.answer is not None and self.answer.is_verified_last
        if is_attempt and isinstance(error, NoLegalToken):
            return self.next_attempt()
        raise error

    def sample(self, logits: Logits) -> int:
        """Return the next token, given its logits of shape (vocabulary,).

        A constrained answer advances by it, or is closed instead.
        """
        self._stats.record_prefill()
        token_id = self._forced.popleft() if self._forced else self._choose(logits)
        if self.answer is not None:
            while not self.answer.take(token_id) and not self.answer.is_closed:
                self._forced.clear()
                token_id = self._choose(logits)
            self._force()
        if self._meter is not None:
            self._logprobs = self._meter.measure(logits, token_id)
        return token_id

    def _choose(self, logits: Logits) -> int:
        return self._sampler.choose(
            logits, self.token_ids, self.answer, num_prompt=self._num_prompt
        )

    def _force(self) -> None:
        """Find out which tokens must come next, where those that were known have come."""
        if self.answer is not None and not self._forced:
            self._forced.extend(self.answer.forced())

    def _read_ahead(self, cache: KVCache) -> None:
        """Let the pass that ends the prompt compute what must come first, too; `read_forced` takes it afterwards."""
        if self.answer is None or not self.answer.takes_forced or self._meter is not None:
            return
        num_unread = self._num_prompt - self.num_computed
        count = min(len(self._forced), cache.num_free(self.index) - num_unread - 1)
        if self.request.params.max_tokens is not None:
            count = min(count, self.request.params.max_tokens - 1)
        if count > 0 and cache.has_room(self.index, num_unread + count):
            self.token_ids += [*self._forced][:count]
            self._read_until += count

    @property
    def has_read_ahead(self) -> bool:
        """Whether forced tokens were computed that are not taken yet."""
        return self._read_until > self._num_prompt and not self._stats.generated_tokens

    def take_ahead(self, cache: KVCache, *, is_over_budget: bool) -> Iterator[GenerationChunk]:
        """Take the forced tokens that were computed with the prompt, and yield their chunks."""
        self._stats.record_prefill()
        del self.token_ids[self._num_prompt :]
        yield from self.read_forced(cache, is_over_budget=is_over_budget)

    def read_forced(self, cache: KVCache, *, is_over_budget: bool) -> Iterator[GenerationChunk]:
        """Take the tokens that must come next, and yield their chunks.

        The next pass computes them together with the last token. Where the logits of each are asked for, none is taken.
        """
        num_before = len(self.token_ids)
        while self._forced and self._meter is None and not self.is_finished:
            token_id = self._forced.popleft()
            if self.answer is None or not (self.answer.take(token_id) or self.answer.is_closed):
                self._forced.clear()
                break
            yield from self.append(token_id, cache, is_over_budget=is_over_budget)
            self._force()
        if len(self.token_ids) > num_before and self.answer is not None:
            self.answer.skip(len(self.token_ids) - num_before)
            self._read_until = len(self.token_ids)

    def append(
        self, token_id: int, cache: KVCache, *, is_over_budget: bool
    ) -> Iterator[GenerationChunk]:
        """Take a sampled token and yield its chunk; the sequence may be finished then.

        Where a constrained answer must end, the tokens that close it follow; they are not computed.
        """
        if self.answer is not None and self.answer.is_closed:
            yield from self._closed(self.answer, self.answer.closing_reason)
            return
        if self._is_end(token_id):
            yield self._last_chunk(self._stops.rest(), None, "stop")
            return
        text, is_stopped = self._pushed(token_id)
        finish_reason = "stop" if is_stopped else self._finish_reason(cache)
        if finish_reason is None and is_over_budget:
            finish_reason = "memory"
        if finish_reason in (None, "stop") or self.answer is None:
            yield self._chunk(token_id, text, finish_reason, is_stopped=is_stopped)
            return
        yield self._chunk(token_id, text, None)
        yield from self._closed(self.answer, finish_reason)

    def _pushed(self, token_id: int) -> tuple[str, bool]:
        """Count a token; return the text that may be shown now, and whether the answer ends by it."""
        self._stats.record_token()
        text, is_stopped = self._stops.push(self._stream.push(token_id))
        return text, is_stopped

    def _chunk(
        self, token_id: int, text: str, finish_reason: str | None, *, is_stopped: bool = False
    ) -> GenerationChunk:
        logprobs, self._logprobs = self._logprobs, None  # closing tokens have none
        if finish_reason is not None:
            rest = "" if is_stopped else self._stops.rest()
            return self._last_chunk(text + rest, token_id, finish_reason, logprobs)
        self.token_ids.append(token_id)
        return GenerationChunk(text, token_id, None, self._stats.statistics(), logprobs=logprobs)

    def _closed(self, answer: ConstrainedAnswer, finish_reason: str) -> Iterator[GenerationChunk]:
        """Yield the tokens that close the answer; the last chunk has the reason for which it had to end."""
        self._logprobs = None
        for token_id in answer.close():
            text, _ = self._pushed(token_id)
            yield self._chunk(token_id, text, None)
        yield self._last_chunk(self._stops.rest(), None, finish_reason)

    def _last_chunk(
        self,
        text: str,
        token_id: int | None,
        finish_reason: str,
        logprobs: TokenLogprob | None = None,
    ) -> GenerationChunk:
        self.is_finished = True
        spans = self._context.retained_spans() if self.request.params.explain else ()
        return GenerationChunk(
            text, token_id, finish_reason, self._stats.final(), tuple(spans), logprobs=logprobs
        )

    def _finish_reason(self, cache: KVCache) -> str | None:
        if self.answer is not None and self.answer.is_done:
            return "stop"
        if self._stats.generated_tokens == self.request.params.max_tokens:
            return "length"
        num_waiting = len(self.token_ids) - self.num_computed  # forced text, read in the next pass
        if cache.num_free(self.index) <= num_waiting:
            return "context"
        return None if cache.has_room(self.index, num_waiting + 1) else "memory"

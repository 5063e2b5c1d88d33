"""The loop of several answers: what they share is read once, then each pass takes all of them a step on, or
several steps, where drafts are verified. Knows no budget and no text.

BatchSequence: one answer of several that are generated together. Knows no model and no other member."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lowtide.attention.policy import PassController
from lowtide.models.draft_tree import TokenTree
from lowtide.models.model import Model, SequenceBatch, SequenceSlice
from lowtide.models.tokenizer import TextStream, common_prefix
from lowtide.runtime.batch.speculation import BatchSpeculation, SequenceSpeculation
from lowtide.runtime.generation.generate import (
    GenerationChunk,
    GenerationContext,
    Prompt,
    StatsRecorder,
    StopMatcher,
)
from lowtide.runtime.generation.sampling import Sampler
from lowtide.runtime.generation.statistics import Statistics
from lowtide.runtime.generation.watchdog import Watchdog
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.profiling.profiler import DECODE, PREFILL, SILENT, Profiler
from lowtide.runtime.speculation.acceptance import DraftVerification

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D


@dataclass(frozen=True, slots=True)
class BatchPrompt:
    """A prompt that fits the context, and how it is to be answered."""

    prompt: Prompt
    options: SamplingParams

    def most_cells(self, context: int) -> int:
        """Return how many tokens it may have in the cache: the last one that is sampled is not computed."""
        num_tokens = len(self.prompt.token_ids)
        if self.options.max_tokens is None:
            return context
        return min(num_tokens + self.options.max_tokens - 1, context)


@dataclass(slots=True)
class BatchSequence:
    """Samples, and ends, as the loop of one answer does.

    `pending` are its tokens that are not computed yet, `computed` how many are. `drafted` are computed
    behind the pending one, and count once they are accepted: `speculation` proposes them.
    """

    index: int
    asked: BatchPrompt
    model: Model
    facts: GenerationContext
    speculation: SequenceSpeculation | None = None
    drafted: tuple[int, ...] = field(init=False, default=())
    pending: list[int] = field(init=False)
    computed: int = field(init=False, default=0)
    is_reading: bool = field(init=False, default=True)
    is_done: bool = field(init=False, default=False)
    _history: list[int] = field(init=False)
    _sampler: Sampler = field(init=False)
    _stream: TextStream = field(init=False)
    _stops: StopMatcher = field(init=False)
    _meter: StatsRecorder = field(init=False)

    def __post_init__(self) -> None:
        prompt, options = self.asked.prompt, self.asked.options
        self.pending = list(prompt.token_ids)
        self._history = list(prompt.token_ids)
        self._sampler = Sampler(options)
        self._stream, self._stops = TextStream(self.model.tokenizer), StopMatcher(options.stop)
        self._meter = StatsRecorder(self.model, prompt, self._sampler.seed, self.facts)

    def begin_behind(self, num_shared: int) -> None:
        """Take the first tokens of the prompt as computed; for all but the first member by another."""
        del self.pending[:num_shared]
        self.computed = num_shared
        self._meter.reused_tokens = num_shared if self.index else 0

    def taken(self, num_tokens: int) -> list[int]:
        """Return up to so many of the pending tokens, which are computed next."""
        taken, self.pending = self.pending[:num_tokens], self.pending[num_tokens:]
        self.computed += len(taken)
        return taken

    @property
    def text(self) -> Sequence[int]:
        """The prompt's tokens and those that were chosen."""
        return self._history

    @property
    def num_free(self) -> int:
        """How many drafts the cache has a cell for, behind what is pending."""
        most = self.asked.most_cells(self.model.context)
        return most - self.computed - len(self.pending)

    def follows(self, token_id: int, *, is_accepted: bool) -> None:
        """Go on behind a token that was chosen; where it `is_accepted` it is computed already."""
        if is_accepted:
            self.taken(1)
        if self.speculation is not None:
            self.speculation.observe_token(token_id, is_accepted=is_accepted)

    def answer(self, logits: Logits, *, is_over: bool) -> GenerationChunk:
        """Return the next piece; `is_over` says that the budget has no room for another token."""
        if self.is_reading:
            self.is_reading = False
            self._meter.prefilled()
        token_id = self._sampler.choose(logits, self._history)
        if self.model.tokenizer.is_end(token_id):
            self.is_done = True
            return GenerationChunk(self._stops.rest(), None, "stop", self._final())
        self._meter.sampled()
        text, stopped = self._stops.push(self._stream.push(token_id))
        finish_reason = self._finish_reason(stopped)
        if finish_reason is None and is_over:
            finish_reason = "memory"
        if finish_reason is not None:
            self.is_done = True
            rest = "" if stopped else self._stops.rest()
            return GenerationChunk(text + rest, token_id, finish_reason, self._final())
        self._history.append(token_id)
        self.pending.append(token_id)
        return GenerationChunk(text, token_id, None, self._meter.statistics())

    def _final(self) -> Statistics:
        stats = self._meter.final()
        if self.speculation is None or self.facts.batch is None:
            return stats
        not_identical = self.facts.batch["nondeterminism"]
        return replace(stats, speculation=self.speculation.statistics(not_identical))

    def _finish_reason(self, stopped: bool) -> str | None:
        if stopped:
            return "stop"
        if self._meter.generated_tokens == self.asked.options.max_tokens:
            return "length"
        return "context" if self.computed >= self.model.context else None


def num_shared(prompts: Sequence[BatchPrompt]) -> int:
    """Return how many tokens all prompts begin with; each has one more, whose logits are wanted."""
    first, *others = (asked.prompt.token_ids for asked in prompts)
    if not others:
        return 0
    shared = min(common_prefix(first, other) for other in others)
    return max(min(shared, *(len(asked.prompt.token_ids) - 1 for asked in prompts)), 0)


def generate_together(
    sequences: SequenceBatch,
    members: Sequence[BatchSequence],
    shared_tokens: int,
    controller: PassController,
    watchdog: Watchdog,
    speculation: BatchSpeculation | None = None,
    profiler: Profiler = SILENT,
) -> Iterator[tuple[int, GenerationChunk]]:
    """Yield the pieces of all answers as they come, each with its member's index.

    Member i is sequence i. Prompts are read to the end before anything is decoded after a first token. With
    `speculation` a pass may take an answer on by several tokens; they are the same tokens.
    """
    _read_shared(sequences, members, shared_tokens, controller, profiler)
    active = list(members)
    while active:
        reading = [member for member in active if member.is_reading]
        takes_part = reading or active
        kind = PREFILL if reading else DECODE
        drafting = None if reading else speculation
        if drafting is not None:
            drafting.draft(active)
        (controller.begin_prefill if reading else controller.begin_decode)()
        parts, complete = _parts(takes_part, sequences.batch_size)
        with profiler.span(kind, sum(len(part.token_ids) for part in parts)):
            rows = sequences.forward(parts)
        if drafting is not None:
            drafting.passed()
        is_over, num_tokens = watchdog.is_over(), 0
        for member, its_rows in zip(complete, _by_member(rows, complete), strict=True):
            for piece in _answered(member, its_rows, profiler, is_over=is_over):
                num_tokens += 1
                yield member.index, piece
            if member.drafted:
                sequences.truncate(member.index, member.computed)
        if drafting is not None:
            drafting.end_round(num_tokens)
        active = [member for member in active if not member.is_done]


def _read_shared(
    sequences: SequenceBatch,
    members: Sequence[BatchSequence],
    num_tokens: int,
    controller: PassController,
    profiler: Profiler,
) -> None:
    token_ids = members[0].asked.prompt.token_ids[:num_tokens]
    controller.begin_prefill()
    for start in range(0, num_tokens, sequences.batch_size):
        taken = token_ids[start : start + sequences.batch_size]
        with profiler.span(PREFILL, len(taken)):
            sequences.forward([SequenceSlice(0, taken, num_logits=0)])
    sequences.share()
    for member in members:
        member.begin_behind(num_tokens)


def _parts(
    members: Sequence[BatchSequence], batch_size: int
) -> tuple[list[SequenceSlice], list[BatchSequence]]:
    """Return what goes in next, in order, and the members whose next token can be sampled then."""
    parts, complete, room = list[SequenceSlice](), list[BatchSequence](), batch_size
    for member in members:
        if room == 0:
            break
        taken = [*member.taken(room), *member.drafted]
        room -= len(taken)
        num_logits = 0 if member.pending else 1 + len(member.drafted)
        parts.append(SequenceSlice(member.index, taken, num_logits))
        if not member.pending:
            complete.append(member)
    return parts, complete


def _by_member(rows: Logits2D, members: Sequence[BatchSequence]) -> Iterator[Logits2D]:
    """Yield of a pass's rows those of each member: one, and one for each of its drafts."""
    start = 0
    for member in members:
        end = start + 1 + len(member.drafted)
        yield rows[start:end]
        start = end


def _answered(
    member: BatchSequence, rows: Logits2D, profiler: Profiler, *, is_over: bool
) -> Iterator[GenerationChunk]:
    """Yield the piece that each row gives, up to the first whose token is not what was drafted."""
    tree = TokenTree.chain(member.drafted).behind(member.text[-1])
    verification = DraftVerification(tree, rows)
    logits: Logits | None = verification.first
    while logits is not None:
        with profiler.span("sampling"):
            piece = member.answer(logits, is_over=is_over)
        yield piece
        if member.is_done or piece.token_id is None:
            return
        logits = verification.accept(piece.token_id)
        member.follows(piece.token_id, is_accepted=logits is not None)

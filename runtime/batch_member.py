"""BatchMember: one answer of several that are generated together. Knows no model and no other member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lowtide.models.model import Model
from lowtide.models.tokenizer import TextStream
from lowtide.runtime.answer_meter import AnswerMeter
from lowtide.runtime.generate import Piece, Prompt, RunFacts
from lowtide.runtime.member_speculation import MemberSpeculation
from lowtide.runtime.options import GenerationOptions
from lowtide.runtime.sampling import Sampler
from lowtide.runtime.statistics import Statistics
from lowtide.runtime.stopping import StopMatcher

if TYPE_CHECKING:
    from lowtide.models.model import Logits


@dataclass(frozen=True, slots=True)
class BatchPrompt:
    """A prompt that fits the context, and how it is to be answered."""

    prompt: Prompt
    options: GenerationOptions

    def most_cells(self, context: int) -> int:
        """Return how many tokens it may have in the cache: the last one that is sampled is not computed."""
        num_tokens = len(self.prompt.token_ids)
        if self.options.max_tokens is None:
            return context
        return min(num_tokens + self.options.max_tokens - 1, context)


@dataclass(slots=True)
class BatchMember:
    """Samples, and ends, as the loop of one answer does.

    `pending` are its tokens that are not computed yet, `computed` how many are. `drafted` are computed
    behind the pending one, and count once they are accepted: `speculation` proposes them.
    """

    index: int
    asked: BatchPrompt
    model: Model
    facts: RunFacts
    speculation: MemberSpeculation | None = None
    drafted: tuple[int, ...] = field(init=False, default=())
    pending: list[int] = field(init=False)
    computed: int = field(init=False, default=0)
    is_reading: bool = field(init=False, default=True)
    is_done: bool = field(init=False, default=False)
    _history: list[int] = field(init=False)
    _sampler: Sampler = field(init=False)
    _stream: TextStream = field(init=False)
    _stops: StopMatcher = field(init=False)
    _meter: AnswerMeter = field(init=False)

    def __post_init__(self) -> None:
        prompt, options = self.asked.prompt, self.asked.options
        self.pending = list(prompt.token_ids)
        self._history = list(prompt.token_ids)
        self._sampler = Sampler(options)
        self._stream, self._stops = TextStream(self.model.tokenizer), StopMatcher(options.stop)
        self._meter = AnswerMeter(self.model, prompt, self._sampler.seed, self.facts)

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
            self.speculation.came(token_id, is_accepted=is_accepted)

    def answer(self, logits: Logits, *, is_over: bool) -> Piece:
        """Return the next piece; `is_over` says that the budget has no room for another token."""
        if self.is_reading:
            self.is_reading = False
            self._meter.prefilled()
        token_id = self._sampler.choose(logits, self._history)
        if self.model.tokenizer.is_end(token_id):
            self.is_done = True
            return Piece(self._stops.rest(), None, "stop", self._final())
        self._meter.sampled()
        text, stopped = self._stops.push(self._stream.push(token_id))
        finish_reason = self._finish_reason(stopped)
        if finish_reason is None and is_over:
            finish_reason = "memory"
        if finish_reason is not None:
            self.is_done = True
            rest = "" if stopped else self._stops.rest()
            return Piece(text + rest, token_id, finish_reason, self._final())
        self._history.append(token_id)
        self.pending.append(token_id)
        return Piece(text, token_id, None, self._meter.statistics())

    def _final(self) -> Statistics:
        stats = self._meter.final()
        if self.speculation is None or self.facts.batch is None:
            return stats
        not_identical = self.facts.batch["why_not_identical"]
        return replace(stats, speculation=self.speculation.statistics(not_identical))

    def _finish_reason(self, stopped: bool) -> str | None:
        if stopped:
            return "stop"
        if self._meter.generated_tokens == self.asked.options.max_tokens:
            return "length"
        return "context" if self.computed >= self.model.context else None

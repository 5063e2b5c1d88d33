"""DecodeLoop: prefill, sample, verify drafts, decode, for sequences that come and go; a single answer is one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from lowtide.models.draft_tree import TokenTree
from lowtide.models.errors import ForwardError
from lowtide.models.model import SequenceSlice
from lowtide.runtime.generation.pace import PromptPace
from lowtide.runtime.generation.result import GenerationChunk
from lowtide.runtime.generation.state import GenerationContext, GenerationState
from lowtide.runtime.kv.cache import DecodeStep, KVCache
from lowtide.runtime.profiling.profiler import SILENT, Profiler
from lowtide.runtime.speculation.acceptance import DraftVerification

if TYPE_CHECKING:
    from lowtide.models.model import Logits
    from lowtide.runtime.kv.cache import PassResult

Outcome: TypeAlias = tuple[Hashable, GenerationChunk | Exception]
"""The key of a sequence, and its next chunk or the error that ended it."""
OLDEST_SHARE = 4
"""The prompt that waits longest gets a quarter of what a pass has for prompts; the shortest ones get the rest."""


class DecodeLoop:
    """Computes the sequences that were added, in passes of `cache.batch_size` tokens.

    Each pass computes the last token of every answer, the drafts that `context.speculation` proposes for it, and tokens
    of the prompts that are not read yet, as many as `pace` allows (None: as many as a pass takes). A sequence advances
    by one token and by every draft that is right, so its tokens are the same as without drafts. Sequences join and
    leave between passes; an error of one ends that one alone.
    """

    def __init__(
        self,
        cache: KVCache,
        context: GenerationContext,
        profiler: Profiler = SILENT,
        pace: PromptPace | None = None,
    ) -> None:
        self._cache = cache
        self._context = context
        self._profiler = profiler
        self._waiting: deque[GenerationState] = deque()
        self._active: list[GenerationState] = []
        self._places = list(reversed(range(cache.num_sequences)))
        self._pace = pace
        self._has_changed = self._is_reading = False  # since waiting sequences last tried to join

    @property
    def num_running(self) -> int:
        """How many sequences are computed."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """How many sequences wait for a place or for room in the cache."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is left."""
        return not self._active and not self._waiting

    def add(self, sequence: GenerationState) -> None:
        """Let a sequence join when there is a place and room for it, behind those that came before."""
        self._waiting.append(sequence)
        self._has_changed = True

    def remove(self, key: Hashable) -> None:
        """Let the sequence with this key leave, whether it runs or waits; nothing happens where there is none."""
        for waiting in [one for one in self._waiting if one.key == key]:
            self._waiting.remove(waiting)
        for active in [one for one in self._active if one.key == key]:
            self._leave(active)

    def run(self) -> Generator[tuple[Hashable, GenerationChunk], None, None]:
        """Yield the chunks of all sequences as they come; raise the first error when the others have ended.

        Closing the generator leaves the cache usable.
        """
        failed: Exception | None = None
        while not self.is_idle:
            for key, outcome in self.step():
                if isinstance(outcome, Exception):
                    failed = failed or outcome
                else:
                    yield key, outcome
        if failed is not None:
            raise failed

    def step(self) -> Iterator[Outcome]:
        """Let sequences join, compute one pass, and yield what it gives."""
        yield from self._join()
        if not self._active:
            return
        steps = self._steps()
        chunks = self._chunks(self._cache.batch_size - sum(len(one.tree) for one in steps))
        sequences = [*self._named(chunks), *self._named(steps)]
        try:
            results = self._compute(chunks, steps)
        except Exception as error:
            yield from self._fail(error)
            return
        num_tokens, is_over_budget = 0, self._context.watchdog.is_over()
        trees = [*(None for _ in chunks), *(one.tree for one in steps)]
        for sequence, tree, result in zip(sequences, trees, results, strict=True):
            if isinstance(result, ForwardError):
                yield self._ended_by(sequence, result, is_damaged=True)
            elif len(result):
                root = TokenTree.chain(sequence.token_ids[-1:]) if tree is None else tree
                verification = DraftVerification(root, result)
                for outcome in self._sampled(sequence, verification, is_over_budget):
                    num_tokens += 1
                    yield outcome
                if verification.num_drafted and sequence in self._active:
                    self._cache.truncate(sequence.index, sequence.num_computed)
        speculation = self._context.speculation
        if speculation is not None and self._active:
            speculation.end_round(num_tokens)

    def _named(
        self, parts: Sequence[SequenceSlice] | Sequence[DecodeStep]
    ) -> list[GenerationState]:
        by_index = {one.index: one for one in self._active}
        return [by_index[part.sequence] for part in parts]

    def _join(self) -> Iterator[Outcome]:
        """Let waiting sequences join, in order; those whose prompt begins like one that is read are overtaken."""
        if not self._waiting or not (self._has_changed or self._is_reading):
            return
        self._has_changed = self._is_reading = False
        for sequence in list(self._waiting):
            if not self._places:
                return
            token_ids, owner = sequence.request.token_ids, sequence.request.owner
            if self._cache.is_awaited(token_ids, owner):
                continue
            if not self._cache.can_add(token_ids, sequence.max_kv_tokens, owner):
                return
            self._waiting.remove(sequence)
            try:
                sequence.begin(self._cache, self._places[-1])
            except Exception as error:
                yield sequence.key, error
                continue
            self._places.pop()
            self._active.append(sequence)
            if self._context.speculation is not None:
                self._context.speculation.begin(
                    sequence.index, sequence.answer, is_first=len(self._active) == 1
                )

    def _steps(self) -> list[DecodeStep]:
        """Return the last token of each answer, with drafts where no prompt is read beside them."""
        decoding = [one for one in self._active if not one.is_prefilling]
        speculation = self._context.speculation
        if speculation is None or len(decoding) < len(self._active):
            return [DecodeStep(one.index, TokenTree.chain(one.token_ids[-1:])) for one in decoding]
        drafts = speculation.propose(
            [(one.index, one.token_ids, self._cache.num_free(one.index) - 1) for one in decoding]
        )
        return [
            DecodeStep(one.index, _with_drafts(one.token_ids[-1], tree))
            for one, tree in zip(decoding, drafts, strict=True)
        ]

    def _chunks(self, room: int) -> list[SequenceSlice]:
        """Return the tokens of prompts that the next pass computes."""
        reading = [one for one in self._active if one.is_prefilling]
        if not reading or room <= 0:
            return []
        if self._pace is not None:
            room = self._pace.max_tokens(room)
        oldest = min(reading[0].num_unread, -(-room // OLDEST_SHARE))
        room -= oldest
        shares = {reading[0].index: oldest}
        for one in sorted(reading, key=lambda one: one.num_unread):
            given = shares.get(one.index, 0)
            more = min(one.num_unread - given, room)
            shares[one.index], room = given + more, room - more
        chunks = []
        self._is_reading = True  # what a waiting prompt begins with may be there after the pass
        for one in reading:
            if shares[one.index]:
                token_ids = one.next_chunk(shares[one.index])
                chunks.append(SequenceSlice(one.index, token_ids, int(not one.is_prefilling)))
        return chunks

    def _compute(
        self, chunks: Sequence[SequenceSlice], steps: Sequence[DecodeStep]
    ) -> list[PassResult]:
        speculation = self._context.speculation
        clock = time.perf_counter if speculation is None else speculation.costs.clock
        started = clock()
        results = self._cache.compute(chunks, steps)
        seconds = clock() - started
        if self._pace is not None:
            self._pace.record(sum(len(one.token_ids) for one in chunks), len(steps), seconds)
        if speculation is not None and steps and not chunks:
            speculation.record_step([(one.sequence, len(one.tree) - 1) for one in steps], seconds)
        for one in self._named(steps):
            one.num_computed += 1
        return results

    def _sampled(
        self, sequence: GenerationState, verification: DraftVerification, is_over_budget: bool
    ) -> Iterator[Outcome]:
        """Yield the chunk of each verified row, up to the first token that was not drafted."""
        try:
            for chunk in self._sample(sequence, verification, is_over_budget=is_over_budget):
                if sequence.holds_back(chunk):
                    continue
                yield sequence.key, chunk
            if not sequence.is_finished:
                return
            again = sequence.next_attempt()
        except Exception as error:
            try:
                again = sequence.attempt_after(error)
            except Exception as final:
                yield self._ended_by(sequence, final)
                return
        self._leave(sequence)
        if again is not None:
            self._waiting.appendleft(again)
            return
        for chunk in sequence.held_back:
            yield sequence.key, chunk

    def _sample(
        self, sequence: GenerationState, verification: DraftVerification, *, is_over_budget: bool
    ) -> Iterator[GenerationChunk]:
        speculation = self._context.speculation
        logits: Logits | None = verification.first
        if sequence.has_read_ahead:
            ahead = sequence.take_ahead(self._cache, is_over_budget=is_over_budget)
            yield from self._forced_chunks(sequence, ahead)
            if sequence.is_finished or sequence.is_prefilling:
                return
        while logits is not None:
            with self._profiler.span("sampling"):
                token_id = sequence.sample(logits)
            yield from sequence.append(token_id, self._cache, is_over_budget=is_over_budget)
            if sequence.is_finished:
                return
            logits = verification.accept(token_id)
            if logits is not None:
                self._cache.accept(sequence.index, token_id, verification.row)
                sequence.num_computed += 1
            if speculation is not None:
                speculation.observe_token(
                    sequence.index,
                    token_id,
                    is_accepted=logits is not None,
                    on_branch=logits is not None and verification.is_branch,
                )
        forced = sequence.read_forced(self._cache, is_over_budget=is_over_budget)
        yield from self._forced_chunks(sequence, forced)

    def _forced_chunks(
        self, sequence: GenerationState, chunks: Iterator[GenerationChunk]
    ) -> Iterator[GenerationChunk]:
        """Yield the chunks of forced tokens, which drafts learn from."""
        speculation = self._context.speculation
        for chunk in chunks:
            yield chunk
            if speculation is not None and not sequence.is_finished and chunk.token_id is not None:
                speculation.observe_token(
                    sequence.index, chunk.token_id, is_accepted=False, on_branch=False
                )

    def _leave(self, sequence: GenerationState, *, is_damaged: bool = False) -> None:
        self._active.remove(sequence)
        self._cache.remove(sequence.index, is_damaged=is_damaged)
        self._places.append(sequence.index)
        self._has_changed = True

    def _ended_by(
        self, sequence: GenerationState, error: Exception, *, is_damaged: bool = False
    ) -> Outcome:
        self._leave(sequence, is_damaged=is_damaged)
        return sequence.key, error

    def _fail(self, error: Exception) -> Iterator[Outcome]:
        """End all sequences of a pass that failed; those that wait go on."""
        failed, self._active = self._active, []
        for sequence in failed:
            self._places.append(sequence.index)
        self._cache.recover()
        self._has_changed = True
        for sequence in failed:
            yield sequence.key, error


def _with_drafts(token_id: int, drafts: TokenTree) -> TokenTree:
    """Return a token and the drafts after it, the trunk first as `Model.forward_tree` takes it."""
    return drafts.with_root(token_id).trunk_first() if len(drafts) else TokenTree.chain((token_id,))

"""BatchKV: several sequences in one KV cache, the prefix that all of them share computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowtide.attention.policy import PassController
from lowtide.models.model import SequenceBatch, SequenceSlice
from lowtide.runtime.kv.cache import CachedPrompt, DecodeStep, KVCache
from lowtide.runtime.profiling.profiler import DECODE, PREFILL, SILENT, Profiler

if TYPE_CHECKING:
    from lowtide.models.model import Logits2D


class BatchKV(KVCache):
    """Runs the passes of `sequences`, which belong to whoever opened them.

    Sequence i holds at most `limits[i]` tokens. All prompts begin with the same `shared_tokens` tokens; adding
    sequence 0, which comes first, computes them. Drafts are chains here: a branch would need a sequence of
    its own.
    """

    def __init__(
        self,
        sequences: SequenceBatch,
        limits: Sequence[int],
        shared_tokens: int = 0,
        controller: PassController | None = None,
        profiler: Profiler = SILENT,
    ) -> None:
        self._sequences = sequences
        self._limits = tuple(limits)
        self._num_shared = shared_tokens
        self._controller = controller or PassController()
        self._profiler = profiler
        self._num_tokens = [0] * len(self._limits)

    @property
    def batch_size(self) -> int:
        """Tokens that one forward pass takes."""
        return self._sequences.batch_size

    def add(self, sequence: int, token_ids: Sequence[int]) -> CachedPrompt:
        """Begin the sequence with the shared tokens; sequence 0 computes them."""
        if sequence == 0:
            self._prefill_shared(token_ids[: self._num_shared])
        self._num_tokens[sequence] = self._num_shared
        return CachedPrompt(
            token_ids=token_ids,
            num_cached=self._num_shared,
            num_reused=self._num_shared if sequence else 0,
        )

    def _prefill_shared(self, token_ids: Sequence[int]) -> None:
        self._controller.begin_prefill()
        for start in range(0, len(token_ids), self.batch_size):
            chunk = token_ids[start : start + self.batch_size]
            with self._profiler.span(PREFILL, len(chunk)):
                self._sequences.forward([SequenceSlice(0, chunk, num_logits=0)])
        self._sequences.share()

    def prefill(self, chunks: Sequence[SequenceSlice]) -> list[Logits2D]:
        """Append prompt tokens; see `KVCache.prefill`."""
        self._controller.begin_prefill()
        for chunk in chunks:
            self._num_tokens[chunk.sequence] += len(chunk.token_ids)
        return self._forward(PREFILL, chunks)

    def decode(self, steps: Sequence[DecodeStep]) -> list[Logits2D]:
        """Compute last tokens and drafts; see `KVCache.decode`."""
        self._controller.begin_decode()
        for step in steps:
            self._num_tokens[step.sequence] += 1
        slices = [
            SequenceSlice(step.sequence, step.tree.token_ids, num_logits=len(step.tree))
            for step in steps
        ]
        return self._forward(DECODE, slices)

    def _forward(self, kind: str, slices: Sequence[SequenceSlice]) -> list[Logits2D]:
        with self._profiler.span(kind, sum(len(one.token_ids) for one in slices)):
            rows = self._sequences.forward(slices)
        logits: list[Logits2D] = []
        start = 0
        for one in slices:
            logits.append(rows[start : start + one.num_logits])
            start += one.num_logits
        return logits

    def accept(self, sequence: int, token_id: int, row: int) -> None:
        """Count a draft, which lies in its place already, as the sequence's own."""
        self._num_tokens[sequence] += 1

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Remove the sequence's tokens from `num_tokens` on; other sequences may use their slots."""
        self._sequences.truncate(sequence, num_tokens)
        self._num_tokens[sequence] = min(self._num_tokens[sequence], num_tokens)

    def num_free(self, sequence: int) -> int:
        """Return how many more tokens the sequence may have."""
        return self._limits[sequence] - self._num_tokens[sequence]

    def has_room(self, sequence: int) -> bool:
        """Return True: the whole batch was reserved when it was opened."""
        return True

"""BatchKV: sequences that come and go in one KV cache, where a prefix of several is computed and stored once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowtide.attention.policy import PassController
from lowtide.models.model import SequenceBatch, SequenceSlice
from lowtide.models.text.tokenizer import common_prefix
from lowtide.runtime.kv.cache import CachedPrompt, DecodeStep, KVCache
from lowtide.runtime.profiling.profiler import DECODE, PREFILL, SILENT, Profiler

if TYPE_CHECKING:
    from lowtide.runtime.kv.cache import PassResult

MIN_AWAITED = 32
"""Tokens that another sequence is about to compute for which a prompt waits: fewer are computed again sooner."""


class BatchKV(KVCache):
    """Runs the passes of `sequences`, which belong to whoever opened them.

    Up to `num_sequences` of them run. The others hold what ended ones have computed: a prompt that begins with the
    same tokens takes their slots over, and a prompt that needs room takes it from the one that ended first. Each
    sequence has its most tokens reserved when it is added, so that none ends for want of room. Drafts are chains here:
    a branch would need a sequence of its own.
    """

    def __init__(
        self,
        sequences: SequenceBatch,
        num_sequences: int,
        controller: PassController | None = None,
        profiler: Profiler = SILENT,
    ) -> None:
        self._sequences = sequences
        self.num_sequences = num_sequences
        self._controller = controller or PassController()
        self._profiler = profiler
        self._forget_all()

    def _forget_all(self) -> None:
        self._texts: list[list[int]] = [[] for _ in range(self._sequences.num_sequences)]
        self._owners = [""] * self._sequences.num_sequences  # of the texts
        self._unused = list(range(self._sequences.num_sequences))
        self._ended: list[int] = []  # that still hold tokens, the one that ended first in front
        self._ids: dict[int, int] = {}  # of the running sequences
        self._prompts: dict[int, Sequence[int]] = {}
        self._limits: dict[int, int] = {}

    @property
    def batch_size(self) -> int:
        """Tokens that one forward pass takes."""
        return self._sequences.batch_size

    def is_awaited(self, token_ids: Sequence[int], owner: str = "") -> bool:
        """Return whether a running sequence has a longer common prefix to read than any has read."""
        reading = [
            prompt
            for i, prompt in self._prompts.items()
            if len(self._texts[self._ids[i]]) < len(prompt) and self._owners[self._ids[i]] == owner
        ]
        if not reading:
            return False
        longest = max(common_prefix(prompt, token_ids[:-1]) for prompt in reading)
        return longest >= self._longest_prefix(token_ids, owner)[1] + MIN_AWAITED

    def can_add(self, token_ids: Sequence[int], max_tokens: int, owner: str = "") -> bool:
        """Return whether the prompt has room beside the running sequences."""
        source, num_common = self._longest_prefix(token_ids, owner)
        held = self._sequences.num_held(self._ids.values(), source, num_common)
        room = self._sequences.num_slots - held - self._num_promised()
        return max_tokens - num_common <= room

    def _num_promised(self) -> int:
        """Return how many more tokens the running sequences may compute."""
        return sum(limit - len(self._texts[self._ids[i]]) for i, limit in self._limits.items())

    def _longest_prefix(self, token_ids: Sequence[int], owner: str) -> tuple[int, int]:
        """Return the sequence of `owner` that begins with most of a prompt, and how many tokens these are.

        The last token is computed in any case, because its logits are needed.
        """
        prompt = token_ids[:-1]
        found = [
            (common_prefix(text, prompt) if self._owners[i] == owner else 0, i)
            for i, text in enumerate(self._texts)
        ]
        num_common, source = max(found, key=lambda one: one[0])
        return source, num_common

    def add(
        self, sequence: int, token_ids: Sequence[int], max_tokens: int, owner: str = ""
    ) -> CachedPrompt:
        """Begin with the tokens that another sequence holds; ended ones make room where it is needed."""
        source, num_common = self._longest_prefix(token_ids, owner)
        self._ids[sequence] = self._begin(source, num_common, max_tokens)
        self._owners[self._ids[sequence]] = owner
        self._prompts[sequence], self._limits[sequence] = token_ids, max_tokens
        return CachedPrompt(token_ids=token_ids, num_cached=num_common, num_reused=num_common)

    def _begin(self, source: int, num_common: int, max_tokens: int) -> int:
        """Return a sequence of llama.cpp's that holds the first tokens of `source`, with room for the others."""
        needed = max_tokens - num_common + self._num_promised()
        others = [one for one in self._ended if one != source]
        while others and (self._sequences.num_free < needed or not self._unused):
            self._discard(others.pop(0))
        is_whole = num_common == len(self._texts[source])
        if source in self._ended and (
            is_whole or not self._unused or self._sequences.num_free < needed
        ):
            self._ended.remove(source)
            self._truncate_id(source, num_common)
            return source
        taken = self._unused.pop()
        if num_common:
            self._sequences.copy_prefix(source, taken, num_common)
            self._texts[taken] = self._texts[source][:num_common]
        return taken

    def remove(self, sequence: int, *, is_damaged: bool = False) -> None:
        """End a sequence; its slots go to the next prompt that begins with its tokens or needs the room."""
        ended = self._ids.pop(sequence)
        del self._prompts[sequence], self._limits[sequence]
        self._ended.append(ended)
        self._truncate_id(ended, len(self._texts[ended]))  # drafts may lie behind them
        if is_damaged or not self._texts[ended]:
            self._discard(ended)

    def discard_ended(self) -> None:
        """Free the slots of all sequences that have ended."""
        for ended in self._ended[:]:
            self._discard(ended)

    def _discard(self, ended: int) -> None:
        self._ended.remove(ended)
        self._truncate_id(ended, 0)
        self._unused.append(ended)

    def recover(self) -> None:
        """Drop all tokens: after a failed pass nobody knows which are there."""
        self._sequences.clear()
        self._forget_all()

    def compute(
        self, chunks: Sequence[SequenceSlice], steps: Sequence[DecodeStep]
    ) -> list[PassResult]:
        """Compute a pass; see `KVCache.compute`. Sequences that hold the same slots are neighbours in it."""
        order = sorted(
            range(len(steps)),
            key=lambda i: tuple(self._sequences.neighbours(self._ids[steps[i].sequence])),
        )
        found = self._compute(chunks, [steps[i] for i in order])
        results = found[: len(chunks)] + [found[0]] * len(steps)
        for position, i in enumerate(order):
            results[len(chunks) + i] = found[len(chunks) + position]
        return results

    def _compute(
        self, chunks: Sequence[SequenceSlice], steps: Sequence[DecodeStep]
    ) -> list[PassResult]:
        if chunks:
            self._controller.begin_prefill()
        else:
            self._controller.begin_decode()
        slices = [
            SequenceSlice(self._ids[one.sequence], one.token_ids, one.num_logits) for one in chunks
        ]
        slices += [
            SequenceSlice(self._ids[one.sequence], one.tree.token_ids, len(one.tree))
            for one in steps
        ]
        num_tokens = sum(len(one.token_ids) for one in slices)
        with self._profiler.span(PREFILL if chunks else DECODE, num_tokens):
            rows = self._sequences.forward(slices)
        for one in slices[: len(chunks)]:
            self._texts[one.sequence].extend(one.token_ids)
        for one in slices[len(chunks) :]:
            self._texts[one.sequence].append(one.token_ids[0])
        results: list[PassResult] = []
        start = 0
        for one in slices:
            logits = rows[start : start + one.num_logits]
            results.append(self._sequences.failure(logits, one.token_ids) or logits)
            start += one.num_logits
        return results

    def accept(self, sequence: int, token_id: int, row: int) -> None:
        """Count a draft, which lies in its place already, as the sequence's own."""
        self._texts[self._ids[sequence]].append(token_id)

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Remove the sequence's tokens from `num_tokens` on; other sequences may use their slots."""
        self._truncate_id(self._ids[sequence], num_tokens)

    def _truncate_id(self, one: int, num_tokens: int) -> None:
        self._sequences.truncate(one, num_tokens)
        del self._texts[one][num_tokens:]

    def num_free(self, sequence: int) -> int:
        """Return how many more tokens the sequence may have."""
        return self._limits[sequence] - len(self._texts[self._ids[sequence]])

    def has_room(self, sequence: int, num_tokens: int = 1) -> bool:
        """Return True: the room of a sequence was reserved when it was added."""
        return True

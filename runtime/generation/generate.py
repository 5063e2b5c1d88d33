"""The decode loop: prefill, sample, verify drafts, decode. A single answer is a loop over one sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lowtide.models.draft_tree import TokenTree
from lowtide.models.model import SequenceSlice
from lowtide.runtime.generation.result import GenerationChunk
from lowtide.runtime.generation.state import GenerationContext, GenerationState
from lowtide.runtime.kv.cache import DecodeStep, KVCache
from lowtide.runtime.profiling.profiler import SILENT, Profiler
from lowtide.runtime.speculation.acceptance import DraftVerification
from lowtide.runtime.speculation.controller import SpeculationController

if TYPE_CHECKING:
    from lowtide.models.model import Logits


def generate(
    cache: KVCache,
    sequences: Sequence[GenerationState],
    context: GenerationContext,
    profiler: Profiler = SILENT,
) -> Iterator[tuple[int, GenerationChunk]]:
    """Yield each sequence's chunks as they come, as pairs of its index and the chunk.

    Prompts are computed first, in passes of `cache.batch_size` tokens. Then each pass computes the last token of
    every sequence and the drafts that `context.speculation` proposes: a sequence advances by one token and by
    every draft that is right, so its tokens are the same as without drafts. Closing the iterator leaves the
    cache usable.
    """
    speculation = context.speculation
    for sequence in sequences:
        sequence.begin(cache)
    if speculation is not None:
        speculation.begin([sequence.answer for sequence in sequences])
    active = list(sequences)
    while active:
        waiting = [sequence for sequence in active if sequence.is_prefilling]
        computed = _prefill(cache, waiting) if waiting else _decode(cache, active, speculation)
        # Asked once a pass: over the budget, all sequences that sample from it end together.
        is_over_budget = bool(computed) and context.watchdog.is_over()
        num_tokens = 0
        for sequence, verification in computed:
            for chunk in _sample(
                cache, sequence, verification, speculation, profiler, is_over_budget=is_over_budget
            ):
                num_tokens += 1
                yield sequence.index, chunk
            if verification.num_drafted:
                cache.truncate(sequence.index, sequence.num_computed)
        active = [sequence for sequence in active if not sequence.is_finished]
        if speculation is not None and active:
            speculation.end_round(num_tokens)


def _prefill(
    cache: KVCache, sequences: Sequence[GenerationState]
) -> list[tuple[GenerationState, DraftVerification]]:
    """Compute the next prompt tokens in one pass; return the sequences that can sample from it."""
    chunks, complete, room = list[SequenceSlice](), list[GenerationState](), cache.batch_size
    for sequence in sequences:
        if room == 0:
            break
        token_ids = sequence.next_chunk(room)
        room -= len(token_ids)
        chunks.append(SequenceSlice(sequence.index, token_ids, int(not sequence.is_prefilling)))
        if not sequence.is_prefilling:
            complete.append(sequence)
    rows = [logits for logits in cache.prefill(chunks) if len(logits)]
    return [
        (sequence, DraftVerification(TokenTree.chain(sequence.token_ids[-1:]), logits))
        for sequence, logits in zip(complete, rows, strict=True)
    ]


def _decode(
    cache: KVCache, sequences: Sequence[GenerationState], speculation: SpeculationController | None
) -> list[tuple[GenerationState, DraftVerification]]:
    """Compute the last token of each sequence in one pass, and the drafts that speculation proposes."""
    if speculation is None:
        steps = [DecodeStep(s.index, TokenTree.chain(s.token_ids[-1:])) for s in sequences]
        rows = cache.decode(steps)
    else:
        drafts = speculation.propose(
            [(s.index, s.token_ids, cache.num_free(s.index) - 1) for s in sequences]
        )
        steps = [
            DecodeStep(s.index, _with_drafts(s.token_ids[-1], tree))
            for s, tree in zip(sequences, drafts, strict=True)
        ]
        started = speculation.costs.clock()
        rows = cache.decode(steps)
        seconds = speculation.costs.clock() - started
        speculation.record_step([(step.sequence, len(step.tree) - 1) for step in steps], seconds)
    for sequence in sequences:
        sequence.num_computed += 1
    return [
        (sequence, DraftVerification(step.tree, logits))
        for sequence, step, logits in zip(sequences, steps, rows, strict=True)
    ]


def _with_drafts(token_id: int, drafts: TokenTree) -> TokenTree:
    """Return a token and the drafts after it, the trunk first as `Model.forward_tree` takes it."""
    return drafts.with_root(token_id).trunk_first() if len(drafts) else TokenTree.chain((token_id,))


def _sample(
    cache: KVCache,
    sequence: GenerationState,
    verification: DraftVerification,
    speculation: SpeculationController | None,
    profiler: Profiler,
    *,
    is_over_budget: bool,
) -> Iterator[GenerationChunk]:
    """Yield the chunk of each verified row, up to the first token that was not drafted."""
    logits: Logits | None = verification.first
    while logits is not None:
        with profiler.span("sampling"):
            token_id = sequence.sample(logits)
        yield from sequence.append(token_id, cache, is_over_budget=is_over_budget)
        if sequence.is_finished:
            return
        logits = verification.accept(token_id)
        if logits is not None:
            cache.accept(sequence.index, token_id, verification.row)
            sequence.num_computed += 1
        if speculation is not None:
            speculation.observe_token(
                sequence.index,
                token_id,
                is_accepted=logits is not None,
                on_branch=logits is not None and verification.is_branch,
            )

"""BatchPlan: what several sequences take that go through a model together, beside what it holds already.

By arithmetic alone: exact for the cache, an upper bound for the rest. Knows no tokens but their number.

RowShares: how many rows of a pass each sequence of a batch gets for what is drafted for it.

By arithmetic alone, as `speculation_plan` does it for one sequence. Knows no tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from lowtide.memory.plan import estimates as footprint
from lowtide.memory.plan.estimates import ContextSizes
from lowtide.memory.plan.speculation import LOGITS_COPIES, SpeculationConfig
from lowtide.models.spec import ModelSpec

CELL_NOTES = 16
"""Bytes of a cell in our lists of where a sequence's keys lie, and in llama.cpp's of whose it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """`num_cells` tokens of KV cache for so many sequences: what they share, once, and each one's own.

    The logits of `num_logits` rows of a pass come out: one for each sequence, and one for each draft that
    is verified. Drafts take no cells beyond, as none is verified that has no cell in its sequence's share.
    `beside_bytes` are the compute buffer, rows of logits, the kernels' scratch, and what drafts hold.
    """

    num_sequences: int
    shared_tokens: int
    num_cells: int
    num_logits: int
    cache_bytes: int
    beside_bytes: int

    @property
    def most_drafted(self) -> int:
        """How many drafts a pass verifies at most, of all sequences."""
        return self.num_logits - self.num_sequences

    @property
    def num_bytes(self) -> int:
        """Everything."""
        return self.cache_bytes + self.beside_bytes


def plan_batch(
    spec: ModelSpec,
    sizes: ContextSizes,
    *,
    num_sequences: int,
    shared_tokens: int,
    own_tokens: int,
    batch_size: int,
    kv_type: str,
    context: int,
    attention_threads: int,
    most_drafted: int = 0,
    speculation: SpeculationConfig | None = None,
) -> BatchPlan:
    """Plan sequences of `own_tokens` in all behind `shared_tokens`, in passes of `batch_size`.

    At most `most_drafted` tokens of a pass are drafts, whose bytes `speculation` knows. `context` is what
    the model's own plan has the kernels' scratch for, `attention_threads` are the threads of our kernels,
    0 where they do not run.
    """
    num_cells = footprint.padded_context(shared_tokens + own_tokens)
    vocabulary_size = spec.vocabulary.num_tokens
    num_logits = num_sequences + most_drafted
    logits = LOGITS_COPIES * 4 * vocabulary_size * num_logits
    drafts = 0
    if most_drafted and speculation is not None:
        text_tokens = own_tokens + num_sequences * shared_tokens
        drafts = num_sequences * speculation.table_bytes + speculation.token_bytes * text_tokens
    scratch = 0
    if attention_threads:
        scratch = footprint.attention_bytes(spec, max(num_cells, context), attention_threads)
        scratch -= footprint.attention_bytes(spec, context, attention_threads)
    return BatchPlan(
        num_sequences=num_sequences,
        shared_tokens=shared_tokens,
        num_cells=num_cells,
        num_logits=num_logits,
        cache_bytes=sizes.kv_bytes(num_cells, kv_type),
        beside_bytes=sizes.compute_bytes(num_cells, batch_size, kv_type)
        + footprint.CONTEXT_BYTES
        + logits
        + scratch
        + drafts
        + CELL_NOTES * (num_cells + num_sequences * (shared_tokens + 1)),
    )


@dataclass(frozen=True, slots=True)
class RowShares:
    """`num_drafted` tokens of each sequence are verified; `gain` is what that promises.

    `gain` is a multiple of the throughput of a pass without drafts: the most that any number of rows
    promises, also where that is too little to draft anything; None where there is nothing to share out.
    """

    num_drafted: tuple[int, ...]
    gain: float | None


def share_rows(
    acceptances: Sequence[Sequence[float]],
    cost: Callable[[int], float],
    *,
    most_rows: int,
    least_gain: float,
) -> RowShares:
    """Share out a pass of at most `most_rows` rows, of which each sequence has one in any case.

    `acceptances[i]` has, for each token that is proposed for sequence i, how often it comes where those
    before it came; `cost` returns the seconds of a pass by its rows. The next row goes to the token that is
    likeliest to come, and there are as many as promise the most tokens a second; none, where that is not
    `least_gain` times what a pass without drafts gives. No other choice of as many rows promises more: a
    later token of a sequence is never likelier than the one before.
    """
    num_sequences = len(acceptances)
    none = (0,) * num_sequences
    shares, expected = list(none), float(num_sequences)
    best: RowShares | None = None
    waiting = [(-acceptance[0], i) for i, acceptance in enumerate(acceptances) if acceptance]
    heapify(waiting)
    for num_rows in range(num_sequences + 1, most_rows + 1):
        if not waiting:
            break
        reached, i = heappop(waiting)
        expected -= reached
        shares[i] += 1
        if shares[i] < len(acceptances[i]):
            heappush(waiting, (reached * acceptances[i][shares[i]], i))
        gain = expected / num_sequences * cost(num_sequences) / cost(num_rows)
        if best is None or best.gain is None or gain > best.gain:
            best = RowShares(tuple(shares), gain)
    if best is None or best.gain is None:
        return RowShares(none, None)
    return best if best.gain > least_gain else RowShares(none, best.gain)

"""What a batch of sequences takes beside the loaded model, and how a pass is shared among their drafts.

By arithmetic alone: exact for the KV cache, an upper bound for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from lowtide.memory.plan import estimates
from lowtide.memory.plan.estimates import ContextSizes
from lowtide.memory.plan.speculation.choices import LOGITS_COPIES, SpeculationConfig
from lowtide.models.spec import ModelSpec

SLOT_BYTES = 16
"""Bytes of a KV slot in the lists of each sequence's slots."""
TEXT_BYTES = 96
"""Bytes of a token in the texts that are held of prompts, of sequences, and of the last turns of chats."""
SEQUENCE_TOKENS = 1024
"""Tokens of KV cache that a plan has for each sequence beside the longest one."""
MAX_SEQUENCES = 256
"""Sequences that one llama.cpp context can have."""
MAX_DRAFTED = 32
"""Drafts of a pass beyond which more do not pay: a token costs more the more there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """`num_kv_tokens` tokens of KV cache for all sequences: what several begin with once, and each one's own.

    `num_sequences` run together; the cache has `num_held` with those that have ended and still hold tokens. A pass
    returns the logits of up to `num_logits` tokens: one for each sequence and one for each of `max_drafted` drafts, and
    llama.cpp wants as many as the cache has sequences. Drafts take no more KV cache: only those are verified that the
    sequence has room for. `other_bytes` are the compute buffer, the logits, the
    kernels' scratch, and what the drafts and the texts of the sequences hold.
    """

    num_sequences: int
    num_held: int
    num_kv_tokens: int
    num_logits: int
    max_drafted: int
    cache_bytes: int
    other_bytes: int

    @property
    def num_bytes(self) -> int:
        """All bytes."""
        return self.cache_bytes + self.other_bytes


def plan_batch(
    spec: ModelSpec,
    sizes: ContextSizes,
    *,
    num_sequences: int,
    own_tokens: int,
    shared_tokens: int = 0,
    num_held: int | None = None,
    batch_size: int,
    kv_type: str,
    context: int,
    attention_threads: int,
    max_drafted: int = 0,
    speculation: SpeculationConfig | None = None,
    drafts: Sequence[str] = (),
) -> BatchPlan:
    """Plan sequences with `own_tokens` tokens in all after `shared_tokens`, in passes of `batch_size` tokens.

    `num_held` sequences hold tokens, with those that have ended; None: only those that run.

    At most `max_drafted` tokens of a pass come from `drafts`; `speculation` knows their bytes. `context` is the
    context that the model's own plan has kernel scratch for, `attention_threads` the threads of lowtide's kernels (0
    where those do not run).
    """
    num_kv_tokens = estimates.padded_context(shared_tokens + own_tokens)
    num_held = num_held or num_sequences
    num_logits = max(num_sequences + max_drafted, num_held)
    logits = LOGITS_COPIES * 4 * spec.vocabulary.num_tokens * num_logits
    drafts_bytes = 0
    if max_drafted and speculation is not None:
        text_tokens = own_tokens + num_sequences * shared_tokens
        drafts_bytes = speculation.tables_bytes(drafts, text_tokens)
        drafts_bytes += (num_sequences - 1) * speculation.tables_bytes(drafts, 0)
    scratch = 0
    if attention_threads:
        scratch = estimates.attention_bytes(spec, max(num_kv_tokens, context), attention_threads)
        scratch -= estimates.attention_bytes(spec, context, attention_threads)
        longest, num_rows = min(context, num_kv_tokens), num_sequences + max_drafted
        scratch += estimates.shared_keys_bytes(spec, longest, num_rows)
    return BatchPlan(
        num_sequences=num_sequences,
        num_held=num_held,
        num_kv_tokens=num_kv_tokens,
        num_logits=num_logits,
        max_drafted=max_drafted,
        cache_bytes=sizes.kv_bytes(num_kv_tokens, kv_type),
        other_bytes=sizes.compute_bytes(num_kv_tokens, batch_size, kv_type)
        + estimates.CONTEXT_BYTES
        + logits
        + scratch
        + drafts_bytes
        + sizes.slot_bytes(num_kv_tokens, num_kv_tokens)
        + (SLOT_BYTES + TEXT_BYTES) * (num_kv_tokens + num_sequences * (shared_tokens + 1)),
    )


def held_sequences(num_sequences: int, batch_size: int) -> int:
    """Return how many sequences the cache has for so many that run: half as many hold what ended ones computed."""
    most = num_sequences + max(num_sequences // 2, 1)
    return max(min(most, batch_size, MAX_SEQUENCES), num_sequences)


def standing_tokens(num_sequences: int, longest: int) -> int:
    """Return the tokens of KV cache for sequences that come and go, one of which may have `longest` tokens."""
    return longest + (num_sequences - 1) * min(longest, SEQUENCE_TOKENS)


@dataclass(frozen=True, slots=True)
class RowShares:
    """How many drafts of each sequence a pass verifies.

    `gain` is the expected throughput in multiples of a pass without drafts: the most that any number of drafts
    promises, also where that is too little to verify any; None where there are no drafts.
    """

    num_drafted: tuple[int, ...]
    gain: float | None


def share_rows(
    chances: Sequence[Sequence[float]],
    cost: Callable[[int], float],
    *,
    max_rows: int,
    min_gain: float,
    seconds: Sequence[Sequence[float]] | None = None,
) -> RowShares:
    """Share out the tokens of a pass among the drafts of several sequences.

    Each sequence has one token that is no draft; a pass has at most `max_rows` tokens. `chances[i]` are, in
    descending order, the probabilities that the drafts of sequence i are accepted with all before them, and
    `seconds[i]` the times that drafting them takes (None: no time). `cost` returns the seconds of a pass by its
    tokens.

    The next token of the pass goes to the most probable draft, and there are as many as promise the most tokens a
    second; none, unless that is more than `min_gain` times what a pass without drafts gives. No other choice of
    as many drafts promises more.
    """
    num_sequences = len(chances)
    none = (0,) * num_sequences
    shares, expected, drafting_s = list(none), float(num_sequences), 0.0
    best: RowShares | None = None
    waiting = [(-some[0], i) for i, some in enumerate(chances) if some]
    heapify(waiting)
    for num_rows in range(num_sequences + 1, max_rows + 1):
        if not waiting:
            break
        chance, i = heappop(waiting)
        expected -= chance
        if seconds is not None:
            drafting_s += seconds[i][shares[i]]
        shares[i] += 1
        if shares[i] < len(chances[i]):
            heappush(waiting, (-chances[i][shares[i]], i))
        gain = expected / num_sequences * cost(num_sequences) / (cost(num_rows) + drafting_s)
        if best is None or best.gain is None or gain > best.gain:
            best = RowShares(tuple(shares), gain)
    if best is None or best.gain is None:
        return RowShares(none, None)
    return best if best.gain > min_gain else RowShares(none, best.gain)

"""What speculative decoding takes and gains, by arithmetic alone: the model of SpecMemo and its allocator.

A reconstruction, as the paper's own formulas were not at hand. Verifying N tokens in one pass takes N slots of the
KV cache and N rows of logits, not a row for each path of a tree; the draft takes memory of its own. The gain follows
from the measured cost of a pass of N tokens and from the acceptance rate of each position. The operating point is the
least memory that reaches 96 % of the best throughput that fits. When memory is short, drafted tokens go first, from the
last one; then the draft; then speculation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowtide.memory.plan import estimates
from lowtide.memory.plan.line import DRAFT_CACHE, DRAFT_COMPUTE, DRAFT_WEIGHTS, PlanLine
from lowtide.models.spec import ModelSpec

MIN_SPEED_UP = 1.05
"""The least speed-up that is worth any memory."""
ENOUGH_SHARE = 0.96
"""Share of the best throughput that the operating point must reach."""
LOGITS_COPIES = 2
"""llama.cpp holds a row of logits in its graph and in its output."""
DRAFT_BATCH_SIZE = 32
"""Tokens of a forward pass of a draft model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCurve:
    """Seconds of a pass by its tokens, measured at a few numbers of them, ascending from 1."""

    num_rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, num_rows: int) -> float:
        """Return the seconds of a pass, linear between and beyond the measured points."""
        rows, seconds = self.num_rows, self.seconds
        if len(rows) == 1:
            return seconds[0] * num_rows / rows[0]
        right = min(max(bisect_left(rows, num_rows), 1), len(rows) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (rows[right] - rows[left])
        return max(seconds[left] + slope * (num_rows - rows[left]), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPromise:
    """A draft as the allocator sees it.

    `acceptance` is the acceptance rate by position where all drafts before it were right; the last rate holds for
    later positions, too. A proposal of n tokens takes `fixed_s` + n * `token_s` seconds.
    """

    name: str
    acceptance: tuple[float, ...]
    num_bytes: int = 0
    fixed_s: float = 0.0
    token_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationPoint:
    """A draft with passes of `num_rows` tokens: its memory and its expected speed-up."""

    draft: str
    num_rows: int
    num_bytes: int
    speed_up: float


def expected_tokens(acceptance: Sequence[float], num_drafted: int) -> float:
    """Return how many tokens a pass with `num_drafted` drafts gives on average, its own token included."""
    total = reached = 1.0
    for position in range(num_drafted if acceptance else 0):
        reached *= acceptance[min(position, len(acceptance) - 1)]
        total += reached
    return total


def speed_up(draft: DraftPromise, cost: CostCurve, num_rows: int) -> float:
    """Return the throughput with passes of `num_rows` tokens, all but one drafted, relative to none drafted."""
    if num_rows <= 1:
        return 1.0
    num_drafted = num_rows - 1
    drafting_s = draft.fixed_s + draft.token_s * num_drafted
    round_s = cost.of(num_rows) + drafting_s
    return expected_tokens(draft.acceptance, num_drafted) * cost.of(1) / round_s


def verification_bytes(num_rows: int, kv_token_bytes: int, vocabulary_size: int) -> int:
    """Return what a pass of `num_rows` tokens takes beyond a pass of one: KV slots and logits."""
    if num_rows <= 1:
        return 0
    return num_rows * kv_token_bytes + (num_rows - 1) * LOGITS_COPIES * 4 * vocabulary_size


def branch_bytes(num_rows: int, num_cells: int) -> int:
    """Return what lowtide's attention holds for draft trees: the KV slots of each row's path, at the most."""
    return 4 * num_rows * num_cells if num_rows > 2 else 0


def points(
    drafts: Iterable[DraftPromise],
    cost: CostCurve,
    *,
    max_rows: int,
    kv_token_bytes: int,
    vocabulary_size: int,
) -> list[SpeculationPoint]:
    """Return every draft with passes of every size from 2 tokens on."""
    return [
        SpeculationPoint(
            draft=draft.name,
            num_rows=rows,
            num_bytes=draft.num_bytes + verification_bytes(rows, kv_token_bytes, vocabulary_size),
            speed_up=speed_up(draft, cost, rows),
        )
        for draft in drafts
        for rows in range(2, max_rows + 1)
    ]


def best_within(
    candidates: Iterable[SpeculationPoint], budget_bytes: int
) -> SpeculationPoint | None:
    """Return the fastest point that fits and is faster than none, of equals the smallest; None for none."""
    fitting = [point for point in candidates if point.num_bytes <= budget_bytes]
    faster = [point for point in fitting if point.speed_up > 1]
    return max(faster, key=lambda point: (point.speed_up, -point.num_bytes), default=None)


def operating_point(
    candidates: Sequence[SpeculationPoint], budget_bytes: int
) -> SpeculationPoint | None:
    """Return the smallest point that reaches `ENOUGH_SHARE` of the best that fits; None where none pays."""
    best = best_within(candidates, budget_bytes)
    if best is None or best.speed_up < MIN_SPEED_UP:
        return None
    enough = [
        point
        for point in candidates
        if point.num_bytes <= budget_bytes
        and point.speed_up >= max(ENOUGH_SHARE * best.speed_up, MIN_SPEED_UP)
    ]
    return min(enough, key=lambda point: (point.num_bytes, -point.speed_up))


def lower_bound_bytes(candidates: Iterable[SpeculationPoint]) -> int | None:
    """Return the least memory at which speculation reaches `MIN_SPEED_UP`; None where it never does."""
    worth = (point.num_bytes for point in candidates if point.speed_up >= MIN_SPEED_UP)
    return min(worth, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """What a plan must know of speculation before anything is loaded.

    A pass verifies up to `verify_batch` tokens, one of which is no draft. The drafts hold `table_bytes` and
    `token_bytes` for each token of the context. `draft_model`, where there is one, proposes instead of them.
    """

    verify_batch: int
    table_bytes: int = 0
    token_bytes: int = 0
    draft_model: ModelSpec | None = None

    def verify_batches(self) -> tuple[int, ...]:
        """Return the sizes that a plan may choose, from the largest by halves down to the least useful one."""
        halves = (self.verify_batch >> shift for shift in range(self.verify_batch.bit_length()))
        return tuple(size for size in halves if size >= 2)

    def num_bytes(self, spec: ModelSpec, verify_batch: int, kv_tokens: int, kv_type: str) -> int:
        """Return the bytes of passes of `verify_batch` tokens and of the drafts' tables."""
        if verify_batch < 2:
            return 0
        padded_bytes = estimates.kv_bytes(spec, estimates.KV_PADDING, kv_type)
        token_bytes = -(-padded_bytes // estimates.KV_PADDING)
        verifying = verification_bytes(verify_batch, token_bytes, spec.vocabulary.num_tokens)
        return verifying + self.table_bytes + self.token_bytes * kv_tokens

    def draft_model_lines(self, verify_batch: int, kv_tokens: int) -> tuple[PlanLine, ...]:
        """Return the plan lines of the draft model: weights with vocabulary, KV cache, and compute."""
        draft = self.draft_model
        if draft is None or verify_batch < 2:
            return ()
        context = max(estimates.padded_context(kv_tokens), estimates.KV_PADDING)
        weights = estimates.weight_bytes(draft, memory_map=False)
        vocabulary = estimates.vocabulary_bytes(draft.vocabulary)
        compute = (
            estimates.compute_bytes(draft, context, DRAFT_BATCH_SIZE, "f16")
            + estimates.CONTEXT_BYTES
            + estimates.slot_bytes(draft, context, context)
            + 2 * 4 * draft.vocabulary.num_tokens
        )
        why = f"{draft.name}, {draft.quantisation}, with its vocabulary"
        cache = estimates.kv_bytes(draft, context, "f16")
        return (
            PlanLine(DRAFT_WEIGHTS, weights + vocabulary, why),
            PlanLine(DRAFT_CACHE, cache, f"{context:,} tokens of f16"),
            PlanLine(DRAFT_COMPUTE, compute, f"passes of {DRAFT_BATCH_SIZE} tokens"),
        )

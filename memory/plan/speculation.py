"""What speculation takes and what it gives, by arithmetic alone: SpecMemo's model and its allocator.

A reconstruction: the paper's own formulas were not at hand. N rows of one verification take N cells of
the KV cache and N rows of logits, never a row for each path; beside them stands what the draft holds. What
they give follows from what a pass of N rows costs on this device and how often each position is accepted.
Of what fits, the operating point is the least memory that keeps 96 % of the best throughput. When memory is
short, rows go first, from the last one that would be verified; then the draft; then speculation. Knows no
tokens.

SpeculationConfig: what a plan must know of speculation before anything is loaded. Knows no draft."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowtide.memory.plan import estimates as footprint
from lowtide.memory.plan.line import DRAFT_CACHE, DRAFT_COMPUTE, DRAFT_WEIGHTS, PlanLine
from lowtide.models.spec import ModelSpec

LEAST_SPEED_UP = 1.05
"""What speculation must promise to be worth any memory."""
KEPT_SHARE = 0.96
"""Of the best throughput, what the operating point keeps."""
LOGITS_COPIES = 2
"""llama.cpp holds a row of logits in its graph and in its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCurve:
    """Seconds of a pass by its rows, as measured at a few numbers of them, ascending from 1."""

    num_rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, num_rows: int) -> float:
        """Return the seconds of a pass, between and beyond what was measured on a straight line."""
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

    `acceptance` is by position: how often it is accepted where all before it were; the last one holds for
    what comes after it. A proposal of n tokens costs `fixed_s` and n times `token_s`.
    """

    name: str
    acceptance: tuple[float, ...]
    num_bytes: int = 0
    fixed_s: float = 0.0
    token_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationPoint:
    """A draft with so many rows of a verification, what it takes and what it promises."""

    draft: str
    num_rows: int
    num_bytes: int
    speed_up: float


def expected_tokens(acceptance: Sequence[float], num_drafted: int) -> float:
    """Return how many tokens a verification of `num_drafted` tokens gives on average, 1 among them."""
    total = reached = 1.0
    for position in range(num_drafted if acceptance else 0):
        reached *= acceptance[min(position, len(acceptance) - 1)]
        total += reached
    return total


def speed_up(draft: DraftPromise, cost: CostCurve, num_rows: int) -> float:
    """Return the throughput with verifications of `num_rows`, of which one is no draft's, over that
    without."""
    if num_rows <= 1:
        return 1.0
    num_drafted = num_rows - 1
    drafting_s = draft.fixed_s + draft.token_s * num_drafted
    round_s = cost.of(num_rows) + drafting_s
    return expected_tokens(draft.acceptance, num_drafted) * cost.of(1) / round_s


def verification_bytes(num_rows: int, cell_bytes: int, vocabulary_size: int) -> int:
    """Return what rows of a verification take beside a plain step's one: cells and logits."""
    if num_rows <= 1:
        return 0
    return num_rows * cell_bytes + (num_rows - 1) * LOGITS_COPIES * 4 * vocabulary_size


def branch_bytes(num_rows: int, num_cells: int) -> int:
    """Return what our attention keeps of the branches of a verification: of each row at the most, the
    numbers of the cells on its path."""
    return 4 * num_rows * num_cells if num_rows > 2 else 0


def points(
    drafts: Iterable[DraftPromise],
    cost: CostCurve,
    *,
    most_rows: int,
    cell_bytes: int,
    vocabulary_size: int,
) -> list[SpeculationPoint]:
    """Return every draft with every number of rows from 2 on."""
    return [
        SpeculationPoint(
            draft=draft.name,
            num_rows=rows,
            num_bytes=draft.num_bytes + verification_bytes(rows, cell_bytes, vocabulary_size),
            speed_up=speed_up(draft, cost, rows),
        )
        for draft in drafts
        for rows in range(2, most_rows + 1)
    ]


def best_within(
    candidates: Iterable[SpeculationPoint], budget_bytes: int
) -> SpeculationPoint | None:
    """Return the fastest point that fits and is worth it, the smallest of equals; None for none."""
    fitting = [point for point in candidates if point.num_bytes <= budget_bytes]
    worth = [point for point in fitting if point.speed_up > 1]
    return max(worth, key=lambda point: (point.speed_up, -point.num_bytes), default=None)


def operating_point(
    candidates: Sequence[SpeculationPoint], budget_bytes: int
) -> SpeculationPoint | None:
    """Return the smallest point that keeps `KEPT_SHARE` of the best that fits; None where none pays."""
    best = best_within(candidates, budget_bytes)
    if best is None or best.speed_up < LEAST_SPEED_UP:
        return None
    enough = [
        point
        for point in candidates
        if point.num_bytes <= budget_bytes
        and point.speed_up >= max(KEPT_SHARE * best.speed_up, LEAST_SPEED_UP)
    ]
    return min(enough, key=lambda point: (point.num_bytes, -point.speed_up))


def lower_bound_bytes(candidates: Iterable[SpeculationPoint]) -> int | None:
    """Return the least memory at which speculation promises `LEAST_SPEED_UP`; None where none does."""
    worth = (point.num_bytes for point in candidates if point.speed_up >= LEAST_SPEED_UP)
    return min(worth, default=None)


DRAFT_PASS_ROWS = 32
"""Rows of a pass of a draft model: it reads what it missed of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """Verifications of up to `num_rows` rows; `table_bytes` and `token_bytes`, a token of context, are what
    the drafts hold. `draft_model`, where there is one, proposes instead.
    """

    num_rows: int
    table_bytes: int = 0
    token_bytes: int = 0
    draft_model: ModelSpec | None = None

    def row_choices(self) -> tuple[int, ...]:
        """Return how many rows may be verified, from what is wanted down to the least that is of use."""
        halves = (self.num_rows >> shift for shift in range(self.num_rows.bit_length()))
        return tuple(rows for rows in halves if rows >= 2)

    def num_bytes(self, spec: ModelSpec, num_rows: int, kv_tokens: int, kv_type: str) -> int:
        """Return what verifications and the drafts' tables take."""
        if num_rows < 2:
            return 0
        cells = footprint.kv_bytes(spec, footprint.KV_PADDING, kv_type)
        cell_bytes = -(-cells // footprint.KV_PADDING)
        verifying = verification_bytes(num_rows, cell_bytes, spec.vocabulary.num_tokens)
        return verifying + self.table_bytes + self.token_bytes * kv_tokens

    def draft_model_rows(self, num_rows: int, kv_tokens: int) -> tuple[PlanLine, ...]:
        """Return the rows of the draft model: weights with vocabulary, cache, and what a pass takes."""
        draft = self.draft_model
        if draft is None or num_rows < 2:
            return ()
        context = max(footprint.padded_context(kv_tokens), footprint.KV_PADDING)
        weights = footprint.weight_bytes(draft, memory_map=False)
        vocabulary = footprint.vocabulary_bytes(draft.vocabulary)
        passes = (
            footprint.compute_bytes(draft, context, DRAFT_PASS_ROWS, "f16")
            + footprint.CONTEXT_BYTES
            + 2 * 4 * draft.vocabulary.num_tokens
        )
        why = f"{draft.name}, {draft.quantisation}, with its vocabulary"
        return (
            PlanLine(DRAFT_WEIGHTS, weights + vocabulary, why),
            PlanLine(
                DRAFT_CACHE, footprint.kv_bytes(draft, context, "f16"), f"{context:,} tokens of f16"
            ),
            PlanLine(DRAFT_COMPUTE, passes, f"{DRAFT_PASS_ROWS} rows a pass"),
        )

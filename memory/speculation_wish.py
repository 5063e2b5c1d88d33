"""SpeculationWish: what a plan must know of speculation before anything is loaded. Knows no draft."""

from __future__ import annotations

from dataclasses import dataclass

from lowtide.memory import footprint
from lowtide.memory.owners import DRAFT_CACHE, DRAFT_COMPUTE, DRAFT_WEIGHTS
from lowtide.memory.plan_row import PlanRow
from lowtide.memory.speculation_plan import verification_bytes
from lowtide.models.spec import ModelSpec

DRAFT_PASS_ROWS = 32
"""Rows of a pass of a draft model: it reads what it missed of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationWish:
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
        cells = footprint.kv_bytes(spec, footprint.CELL_STEP, kv_type)
        cell_bytes = -(-cells // footprint.CELL_STEP)
        verifying = verification_bytes(num_rows, cell_bytes, spec.vocabulary.num_tokens)
        return verifying + self.table_bytes + self.token_bytes * kv_tokens

    def draft_model_rows(self, num_rows: int, kv_tokens: int) -> tuple[PlanRow, ...]:
        """Return the rows of the draft model: weights with vocabulary, cache, and what a pass takes."""
        draft = self.draft_model
        if draft is None or num_rows < 2:
            return ()
        context = max(footprint.kv_cells(kv_tokens), footprint.CELL_STEP)
        weights = footprint.weight_bytes(draft, memory_map=False)
        vocabulary = footprint.vocabulary_bytes(draft.vocabulary)
        passes = (
            footprint.compute_bytes(draft, context, DRAFT_PASS_ROWS, "f16")
            + footprint.CONTEXT_BYTES
            + 2 * 4 * draft.vocabulary.num_tokens
        )
        why = f"{draft.name}, {draft.quantisation}, with its vocabulary"
        return (
            PlanRow(DRAFT_WEIGHTS, weights + vocabulary, why),
            PlanRow(
                DRAFT_CACHE, footprint.kv_bytes(draft, context, "f16"), f"{context:,} tokens of f16"
            ),
            PlanRow(DRAFT_COMPUTE, passes, f"{DRAFT_PASS_ROWS} rows a pass"),
        )

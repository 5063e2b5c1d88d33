"""What a plan must know of speculation: the choices, the bytes of each, and the table that shows them.

Verifying N tokens in one pass takes N slots of the KV cache and N rows of logits, not a row for each path of a tree;
drafts take memory of their own. What each choice gives is the matter of `memory/plan/speculation/allocator.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from lowtide.memory.plan import estimates
from lowtide.memory.plan.line import DRAFT_CACHE, DRAFT_COMPUTE, DRAFT_WEIGHTS, PlanLine
from lowtide.memory.plan.speculation.allocator import (
    NO_SPECULATION,
    SpeculationChoice,
    SpeculationPoint,
    SpeculationWorth,
    frontier,
    lower_bound_bytes,
)
from lowtide.memory.units import format_bytes
from lowtide.models.spec import ModelSpec

LOGITS_COPIES = 2
"""llama.cpp holds a row of logits in its graph and in its output."""
DRAFT_BATCH_SIZE = 32
"""Tokens of a forward pass of a draft model."""


def verification_bytes(num_rows: int, kv_token_bytes: int, vocabulary_size: int) -> int:
    """Return what a pass of `num_rows` tokens takes beyond a pass of one: KV slots and logits."""
    if num_rows <= 1:
        return 0
    return num_rows * kv_token_bytes + (num_rows - 1) * LOGITS_COPIES * 4 * vocabulary_size


def branch_bytes(num_rows: int, num_cells: int) -> int:
    """Return what lowtide's attention holds for draft trees: the KV slots of each row's path, at the most."""
    return 4 * num_rows * num_cells


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTables:
    """What a draft without a model holds: `table_bytes`, and `token_bytes` for each token of the context."""

    name: str
    table_bytes: int = 0
    token_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """What a plan must know of speculation before anything is loaded.

    A pass verifies up to `verify_batch` tokens, one of which is no draft. The plan chooses among `drafts`; a
    `draft_model`, where there is one, proposes with all of them. `branches` says whether drafts may be trees.
    `costs_key` names the model and the machine that the costs in `worth` hold for.
    """

    verify_batch: int
    worth: SpeculationWorth
    drafts: tuple[DraftTables, ...]
    draft_model: ModelSpec | None = None
    branches: bool = False
    costs_key: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all drafts."""
        return tuple(draft.name for draft in self.drafts)

    @property
    def least(self) -> SpeculationChoice:
        """The choice that is always there: none, or two tokens where the user named a draft model."""
        if self.draft_model is None:
            return NO_SPECULATION
        return SpeculationChoice(drafts=self.names, verify_batch=2)

    @property
    def watching(self) -> SpeculationChoice:
        """The choice of drafts that are compared with the text, but not verified."""
        return SpeculationChoice(drafts=self.names, verify_batch=1)

    def choices(self) -> Iterator[SpeculationChoice]:
        """Yield all choices that verify something."""
        least = len(self.names) if self.draft_model is not None else 1
        for number in range(least, len(self.names) + 1):
            for drafts in combinations(self.names, number):
                for verify_batch in range(2, self.verify_batch + 1):
                    yield SpeculationChoice(drafts=drafts, verify_batch=verify_batch)
                    if self.branches and verify_batch > 2:
                        yield SpeculationChoice(
                            drafts=drafts, verify_batch=verify_batch, branches=True
                        )

    def tables_bytes(self, drafts: Sequence[str], num_tokens: int) -> int:
        """Return what these drafts hold of a text of so many tokens."""
        held = (draft for draft in self.drafts if draft.name in drafts)
        return sum(draft.table_bytes + draft.token_bytes * num_tokens for draft in held)

    def num_bytes(
        self, spec: ModelSpec, choice: SpeculationChoice, kv_tokens: int, kv_type: str
    ) -> int:
        """Return the bytes of a choice: logits and KV slots of drafts, and their tables."""
        if not choice.verify_batch:
            return 0
        padded_bytes = estimates.kv_bytes(spec, estimates.KV_PADDING, kv_type)
        token_bytes = -(-padded_bytes // estimates.KV_PADDING)
        verifying = verification_bytes(choice.verify_batch, token_bytes, spec.vocabulary.num_tokens)
        return verifying + self.tables_bytes(choice.drafts, kv_tokens)

    def draft_model_lines(self, verify_batch: int, kv_tokens: int) -> tuple[PlanLine, ...]:
        """Return the plan lines of the draft model: weights with vocabulary, KV cache, and compute."""
        draft = self.draft_model
        if draft is None or verify_batch < 2:
            return ()
        context = max(estimates.padded_context(kv_tokens), estimates.KV_PADDING)
        weights = estimates.weight_bytes(draft, memory_map=False)
        vocabulary = estimates.vocabulary_bytes(draft.vocabulary) + draft.header_copied_bytes
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationTable:
    """What the plan could choose from, at its own context and KV type, and what it chose.

    `chosen` is None where no drafts are verified; `reason` says why the choice is as it is.
    """

    points: tuple[SpeculationPoint, ...]
    chosen: SpeculationPoint | None
    reason: str
    worth: SpeculationWorth

    @property
    def more(self) -> tuple[SpeculationPoint, ...]:
        """The choices that take more than the chosen one and are faster, from the smallest on."""
        chosen = self.chosen
        return tuple(
            point
            for point in frontier(self.points)
            if chosen is None
            or (point.num_bytes > chosen.num_bytes and point.speed_up > chosen.speed_up)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        taken_bytes = self.chosen.num_bytes if self.chosen else 0
        return {
            "choices": [point.to_dict() for point in self.points],
            "chosen": self.chosen.to_dict() if self.chosen else None,
            "lower_bound_bytes": lower_bound_bytes(self.points),
            "more": [
                {"bytes": point.num_bytes - taken_bytes, "speedup": point.speed_up}
                for point in self.more
            ],
            "reason": self.reason,
            "costs": self.worth.costs_source,
            "acceptance": self.worth.acceptance_source,
        }

    def __str__(self) -> str:
        """Return the choices that no smaller one is as fast as, as a table, and what was chosen and why."""
        bound = lower_bound_bytes(self.points)
        pays = "no choice pays" if bound is None else f"pays from {format_bytes(bound)} on"
        lines = [f"Speculation: {pays}; {self.reason}"]
        for point in frontier(self.points):
            choice = point.choice
            drafted = (
                f"{choice.verify_batch - 1} draft tokens{' in a tree' if choice.branches else ''}"
            )
            mark = "  <- chosen" if point == self.chosen else ""
            lines.append(
                f"  {choice.name:<8} {drafted:<26} {format_bytes(point.num_bytes):>10}  "
                f"{point.speed_up:.2f} x{mark}"
            )
        return "\n".join(
            [
                *lines,
                f"Costs of passes: {self.worth.costs_source}. Acceptance: {self.worth.acceptance_source}.",
            ]
        )

"""What the allocator of a plan knows of speculation: measured costs and acceptance, or what stands in for them."""

from __future__ import annotations

import platform
from typing import Any

from lowtide.memory.plan.speculation.allocator import CostCurve, SpeculationWorth
from lowtide.models.spec import ModelSpec
from lowtide.runtime.speculation.counts import (
    PRIOR_NAME,
    PRIOR_TOKENS,
    AcceptanceCounts,
    file_name,
    prior_counts,
    read_counts,
)
from lowtide.runtime.speculation.step_cost import stored_costs

ASSUMED_TOKEN_COST = 0.05
"""What another token adds to a pass, as a share of a pass of one, where it was never measured: as much as with
repacked weights. It is a low figure, so that the first start has room to measure many tokens."""
ASSUMED_STEP_S = 0.01
COPY_RATE, SMALLER_MODEL_RATE = 0.85, 0.6
"""Assumed acceptance of a draft model until it is counted: of a quantised copy of the model, and of a smaller one."""


def costs_key(spec: ModelSpec, options: Any, policy: Any) -> str:
    """Return what the cost of a pass depends on and is known before a plan."""
    parts = (
        spec.fingerprint, sorted(spec.tensor_types), spec.weight_bytes, platform.node(), platform.machine(),
        options.num_threads, policy, options.repack, spec.engine, options.provider,
    )  # fmt: skip
    return " ".join(map(str, parts))


def placed_key(key: str, kv_type: str, resident_layers: int | None, gpus: object = ()) -> str:
    """Return the key of a model as a plan places it."""
    return f"{key} {kv_type} {resident_layers} {gpus or ()}"


def speculation_worth(
    spec: ModelSpec, key: str, kv_type: str, drafts: tuple[str, ...], draft_model: ModelSpec | None
) -> SpeculationWorth:
    """Return the costs and the acceptance that are known for a model on this machine."""
    costs = stored_costs(placed_key(key, kv_type, None))
    costs_source = "measured on this machine"
    if costs is None:
        costs = CostCurve(
            num_rows=(1, 2), seconds=(ASSUMED_STEP_S, ASSUMED_STEP_S * (1 + ASSUMED_TOKEN_COST))
        )
        costs_source = (
            f"assumed, another token takes {ASSUMED_TOKEN_COST:.0%} of a pass; measured when the model is first "
            "loaded"
        )
    own = read_counts(_file_of(spec, draft_model)).num_tokens
    acceptance_source = _prior(spec, draft_model)[1]
    if own:
        acceptance_source = (
            f"{own:,.0f} tokens of your conversations; {acceptance_source}, which counts for "
            f"{PRIOR_TOKENS} tokens"
        )
    token_s = costs.of(1) * draft_share(spec, draft_model)
    counts = known_counts(spec, draft_model)
    return SpeculationWorth(
        costs=costs,
        situations=counts.situations(drafts, token_s),
        costs_source=costs_source,
        acceptance_source=acceptance_source,
    )


def draft_share(spec: ModelSpec, draft_model: ModelSpec | None) -> float:
    """Return what drafting a token takes, as a share of a pass of one token; 0 without a draft model."""
    if draft_model is None:
        return 0.0
    return draft_model.weight_bytes / max(spec.weight_bytes, 1)


def known_counts(spec: ModelSpec, draft_model: ModelSpec | None) -> AcceptanceCounts:
    """Return what was counted in the user's conversations with a model, and the prior beside it."""
    counts = AcceptanceCounts()
    counts.add(read_counts(_file_of(spec, draft_model)))
    counts.add(_prior(spec, draft_model)[0].scaled_to(PRIOR_TOKENS))
    return counts


def _file_of(spec: ModelSpec, draft_model: ModelSpec | None) -> str:
    return file_name(spec.fingerprint, draft_model.fingerprint if draft_model else "")


def _prior(spec: ModelSpec, draft_model: ModelSpec | None) -> tuple[AcceptanceCounts, str]:
    """Return the counts that stand in for the user's own, and in words where they come from."""
    if draft_model is None:
        return prior_counts(), PRIOR_NAME
    rate = COPY_RATE if _is_copy(draft_model, spec) else SMALLER_MODEL_RATE
    return AcceptanceCounts.of_rate("model", rate), f"assumed, {rate:.0%} at every position"


def _is_copy(draft: ModelSpec, target: ModelSpec) -> bool:
    """Whether a draft model is the model itself with other weights, such as quantised ones."""
    return (draft.architecture, draft.num_layers, draft.embedding_width) == (
        target.architecture,
        target.num_layers,
        target.embedding_width,
    )

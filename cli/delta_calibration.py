"""What `lowtide calibrate --attention delta` does beyond the command."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowtide.attention.calibrate import Targets
    from lowtide.attention.delta.block_policy import DeltaBlocks
    from lowtide.attention.delta.calibration import DeltaCalibration
    from lowtide.attention.delta.policy import Delta
    from lowtide.attention.delta.state_calibration import StateCalibration
    from lowtide.models.spec import ModelSpec
    from lowtide.runtime.loaded_model import LoadedModel


def check_delta(policy: Delta | DeltaBlocks, k_choices: tuple[int, ...]) -> None:
    """Refuse, before anything is loaded, what is searched for or has no meaning."""
    from lowtide.models.errors import BadOption

    stated = [
        name
        for name in ("calibration", "sparsity", "threshold")
        if getattr(policy, name, None) is not None
    ]
    if stated:
        raise BadOption(f"delta's {stated[0]} is given, and is what calibrate finds: leave it out")
    if k_choices:
        raise BadOption("--k is for tidal and gem: leave it out, or delta")


def planned_as(policy: Delta | DeltaBlocks, spec: ModelSpec) -> Delta | DeltaBlocks:
    """Return a policy whose memory is the most that the search takes."""
    from lowtide.attention.delta.block_policy import DeltaBlocks
    from lowtide.attention.delta.state_units import StateUnits
    from lowtide.attention.delta.units import DeltaUnits
    from lowtide.memory.key_groups import PAGE_KEYS

    shape = (spec.num_layers, max(spec.num_kv_heads), spec.key_head_size)
    if isinstance(policy, DeltaBlocks):
        return replace(policy, units=StateUnits.uniform(*shape, block=policy.channels)).fitted(spec)
    return replace(policy, units=DeltaUnits.uniform(*shape, PAGE_KEYS - 1), store=0).fitted(spec)


def calibrated(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    whose: str,
    targets: Targets,
    policy: Delta | DeltaBlocks,
) -> DeltaCalibration | StateCalibration:
    """Search with the loaded model."""
    from lowtide.attention.delta.block_policy import DeltaBlocks
    from lowtide.attention.delta.calibrate import DeltaCalibrator
    from lowtide.attention.delta.state_calibrate import StateCalibrator
    from lowtide.attention.needles import chat_framing
    from lowtide.cli.summary import note

    model, hook, context = loaded.model, loaded.hook, loaded.planned.plan.context
    assert hook is not None
    place = (model, hook, token_ids, context, chat_framing(model))
    if isinstance(policy, DeltaBlocks):
        return StateCalibrator(*place, policy, progress=note).calibration(targets, text=whose)
    return DeltaCalibrator(*place, policy, progress=note).calibration(targets, text=whose)

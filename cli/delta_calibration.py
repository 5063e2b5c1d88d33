"""What `lowtide calibrate --attention delta` does beyond the command."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowtide.attention.calibrate import Targets
    from lowtide.attention.delta.calibration import DeltaCalibration
    from lowtide.attention.delta.policy import Delta
    from lowtide.models.spec import ModelSpec
    from lowtide.runtime.loaded_model import LoadedModel


def check_delta(policy: Delta, k_choices: tuple[int, ...]) -> None:
    """Refuse, before anything is loaded, what is searched for or has no meaning."""
    from lowtide.models.errors import BadOption

    if policy.calibration is not None or policy.sparsity is not None:
        stated = "calibration" if policy.calibration is not None else "sparsity"
        raise BadOption(f"delta's {stated} is given, and is what calibrate finds: leave it out")
    if k_choices:
        raise BadOption("--k is for tidal and gem: leave it out, or delta")


def planned_as(policy: Delta, spec: ModelSpec) -> Delta:
    """Return a policy whose memory is the most that the search takes."""
    from lowtide.attention.delta.units import DeltaUnits
    from lowtide.memory.key_groups import PAGE_KEYS

    units = DeltaUnits.uniform(
        spec.num_layers, max(spec.num_kv_heads), spec.key_head_size, PAGE_KEYS - 1
    )
    return replace(policy, units=units, store=0).fitted(spec)


def calibrated(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    whose: str,
    targets: Targets,
    policy: Delta,
) -> DeltaCalibration:
    """Search with the loaded model."""
    from lowtide.attention.delta.calibrate import DeltaCalibrator
    from lowtide.attention.needles import chat_framing
    from lowtide.cli.summary import note

    model, hook, context = loaded.model, loaded.hook, loaded.planned.plan.context
    assert hook is not None
    framing = chat_framing(model)
    search = DeltaCalibrator(model, hook, token_ids, context, framing, policy, progress=note)
    return search.calibration(targets, text=whose)

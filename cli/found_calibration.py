"""What `lowtide calibrate` does with what it found: writes it, and says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowtide.attention.calibration import Calibration
    from lowtide.attention.delta.calibration import DeltaCalibration
    from lowtide.attention.delta.state_calibration import StateCalibration
    from lowtide.attention.gem_calibration import GemCalibration


def saved(
    found: Calibration | GemCalibration | DeltaCalibration | StateCalibration, output: Path | None
) -> tuple[Path, str]:
    """Write what was found, to `output` or its place in the cache; return where, and what to say of it."""
    from lowtide.attention.calibration import Calibration, save_calibration
    from lowtide.attention.delta.calibration import DeltaCalibration, save_delta_calibration
    from lowtide.attention.delta.state_calibration import StateCalibration, save_state_calibration
    from lowtide.attention.gem_calibration import save_gem_calibration

    if isinstance(found, Calibration):
        return save_calibration(found, output), _tidal_line(found)
    if isinstance(found, DeltaCalibration):
        return save_delta_calibration(found, output), _delta_line(found)
    if isinstance(found, StateCalibration):
        return save_state_calibration(found, output), _state_line(found)
    return save_gem_calibration(found, output), _gem_line(found)


def _tidal_line(found: Calibration) -> str:
    layers = ", ".join(map(str, found.selection_layers))
    return (
        f"k {found.k}, selection layers {layers}: KL {found.kl:.4f} at {found.context:,} tokens, "
        f"loss {found.key_loss:.3f} at pass keys; a token attends to {found.keys_read:.1%} of the cached "
        "keys"
    )


def _gem_line(found: GemCalibration) -> str:
    return (
        f"k {found.k}, layer {found.layer}: of {found.num_asked} questions on up to {found.context:,} "
        f"tokens {found.num_kept} had their sentences kept, with {found.margin:.0%} of k to spare; whole "
        f"prompts answer {found.num_dense_answered}, what was kept {found.num_answered} of these"
    )


def _delta_line(found: DeltaCalibration) -> str:
    return (
        f"sparsity {found.units.sparsity:.1%}: KL {found.kl:.4f} at {found.context:,} tokens, loss "
        f"{found.key_loss:.3f} at pass keys; a token attends to {found.keys_read:.1%} of the cached keys, "
        "groups counted once"
    )


def _state_line(found: StateCalibration) -> str:
    return (
        f"sparsity {found.units.sparsity:.1%} behind the window: KL {found.kl:.4f} at {found.context:,} "
        f"tokens, loss {found.key_loss:.3f} at pass keys"
    )

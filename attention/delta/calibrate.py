"""Finds how much of each layer and KV head delta may group while it stays close to dense attention.

How much a unit loses with so many groups is measured on its own output, while every layer attends to all
keys; a common price of a group then spreads a sparsity over the units. Errors of attention do not tell
which sparsity is harmless, and a divergence averaged over a text not that a digit is lost: both are held
against dense attention end to end, along a text and at pass keys hidden in it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.attention.calibrate import Targets
from lowtide.attention.calibration_file import NotCalibrated
from lowtide.attention.delta.calibration import DeltaCalibration
from lowtide.attention.delta.policy import Delta
from lowtide.attention.delta.units import DeltaUnits, allocate, scale_bytes
from lowtide.attention.graph_hook import GraphHook
from lowtide.attention.needles import Framing
from lowtide.attention.places import Distances, Places
from lowtide.models.model import Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COUNTS = (8, 12, 16, 24, 32, 40, 48, 56)
"""Of a page of 64: the numbers of groups that a unit may get."""
SPARSITIES = (0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
MARGIN = 0.9
"""The search aims so far below the targets: it sees few tokens."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSetting:
    """Units with what they measured, end to end."""

    units: DeltaUnits
    found: Distances

    def __str__(self) -> str:
        return (
            f"sparsity {self.units.sparsity:.0%}: KL {self.found.text.kl:.4f}, loss at pass keys "
            f"{self.found.key_loss:.3f}, reads {self.found.keys_read:.1%}"
        )

    def is_inside(self, targets: Targets, margin: float = 1.0) -> bool:
        """Whether both stay below a share of their targets."""
        inside = self.found.text.kl <= targets.kl * margin
        return inside and self.found.key_loss <= targets.key_loss * margin


class DeltaCalibrator:
    """Measures units on one model; arguments as for `Calibrator`. `policy` has the settings to keep."""

    def __init__(
        self,
        model: Model,
        hook: GraphHook,
        token_ids: Sequence[int],
        context: int,
        framing: Framing,
        policy: Delta,
        progress: Progress = lambda _: None,
    ) -> None:
        half = len(token_ids) // 2
        self._model, self._hook, self._policy = model, hook, policy
        self._context = context
        self._text = token_ids[:half]
        self._searched, self._held_out = (
            Places(model, hook, text, context, framing, seed)
            for seed, text in enumerate((token_ids[:half], token_ids[half:]))
        )
        self._progress = progress

    def calibration(self, targets: Targets, *, text: str) -> DeltaCalibration:
        """Return the sparsest units inside the targets, also on text and keys that the search did not see.

        Raises `NotCalibrated` where there are none.
        """
        spec = self._model.spec
        scales, errors = self._measured()
        sparsest = [
            DeltaUnits(num_groups=allocate(errors, COUNTS, 1 - sparsity), scales=scales)
            for sparsity in SPARSITIES
        ]
        first = bisect_left(
            sparsest,
            True,
            key=lambda units: bool(self._holds(self._searched, units, targets, MARGIN)),
        )
        for units in sparsest[first:]:
            found = self._holds(self._held_out, units, targets)
            if found is not None:
                return DeltaCalibration(
                    fingerprint=spec.fingerprint,
                    model=spec.name,
                    units=units,
                    kl=round(found.text.kl, 5),
                    target_kl=targets.kl,
                    key_loss=round(found.key_loss, 5),
                    target_key_loss=targets.key_loss,
                    context=self._context,
                    keys_read=round(found.keys_read, 4),
                    text=text,
                )
        raise NotCalibrated(
            f"no sparsity down to {min(SPARSITIES):.0%} keeps {spec.name} within a KL of {targets.kl} and "
            f"a loss of {targets.key_loss} at pass keys: raise --target-kl or --target-key-loss"
        )

    def _holds(
        self, places: Places, units: DeltaUnits, targets: Targets, margin: float = 1.0
    ) -> Distances | None:
        """Return how far the units are from dense attention; None where that is too far."""
        policy = Delta(
            units=units,
            window=self._policy.window,
            sinks=self._policy.sinks,
            prompts=self._policy.prompts,
        )
        setting = DeltaSetting(units=units, found=places.distances([policy])[0])
        self._progress(f"{'on other text: ' if margin == 1.0 else ''}{setting}")
        return setting.found if setting.is_inside(targets, margin) else None

    def _measured(self) -> tuple[tuple[tuple[bytes, ...], ...], NDArray[np.float32]]:
        """Return the scales, and each unit's error with each number of groups."""
        import numpy as np

        spec = self._model.spec
        shape = (spec.num_layers, max(spec.num_kv_heads), spec.key_head_size)
        scales = DeltaUnits.uniform(*shape, COUNTS[0]).scales
        errors = []
        for at, count in enumerate((COUNTS[0], *COUNTS)):
            self._progress(f"measuring every layer with {count} groups of 64 keys")
            groups = ((count,) * shape[1],) * shape[0]
            units = DeltaUnits(num_groups=groups, scales=scales)
            Delta(units=units, window=self._policy.window, sinks=self._policy.sinks).install(
                self._hook, spec
            )
            self._hook.measure_groups()
            self._read()
            error, squares = self._hook.group_measures(*shape)
            if at == 0:
                scales = scale_bytes(squares)
            else:
                errors.append(error)
        # A layer with a sliding window is none to group, and keeps everything.
        found = np.where(np.stack(errors) < 0, np.inf, np.stack(errors))
        if not np.isfinite(found).any():
            raise NotCalibrated(
                f"no layer of {spec.name} sees the whole context: delta has nothing to group there"
            )
        return scales, found

    def _read(self) -> None:
        self._model.truncate(0)
        text = self._text[: self._context]
        for at in range(0, len(text), self._model.max_rows):
            self._model.forward(text[at : at + self._model.max_rows])

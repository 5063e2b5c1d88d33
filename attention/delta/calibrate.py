"""Finds how much of each layer and KV head delta may group while it stays close to dense attention.

How much a unit loses with so many groups is measured on its own output, while every layer attends to all
keys, once each takes the lift that is best for it (`fitted_lifts`); a sparsity is then spread so that the
units lose the least together (`cheapest`), and `SparsestPolicy` says which sparsity is harmless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lowtide.attention.calibrate import Targets
from lowtide.attention.calibration_file import NotCalibrated
from lowtide.attention.delta.calibration import DeltaCalibration
from lowtide.attention.delta.lifts import fitted_lifts
from lowtide.attention.delta.policy import Delta
from lowtide.attention.delta.sparsest import Candidate, Progress, SparsestPolicy
from lowtide.attention.delta.units import DeltaUnits, allocate, scale_bytes
from lowtide.attention.graph_hook import GraphHook
from lowtide.attention.needles import Framing
from lowtide.models.model import Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COUNTS = (8, 12, 16, 24, 32, 40, 48, 56)
"""Of a page of 64: the numbers of groups that a unit may get."""
FITTED_COUNT = 32
"""Lifts are fitted with so many groups."""
SPARSITIES = (0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)


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
        self._spec, self._hook, self._policy = model.spec, hook, replace(policy, store=0)
        self._context, self._progress = context, progress
        self._search = SparsestPolicy(model, hook, token_ids, context, framing, progress)

    def calibration(self, targets: Targets, *, text: str) -> DeltaCalibration:
        """Return the sparsest units inside the targets, also on text and keys that the search did not see.

        Raises `NotCalibrated` where there are none.
        """
        of_sparsity = self.spread(SPARSITIES)
        candidates = [
            Candidate(replace(self._policy, units=units), units.sparsity) for units in of_sparsity
        ]
        candidate, found = self._search.found(candidates, targets)
        return DeltaCalibration(
            fingerprint=self._spec.fingerprint,
            model=self._spec.name,
            units=of_sparsity[candidates.index(candidate)],
            kl=round(found.text.kl, 5),
            target_kl=targets.kl,
            key_loss=round(found.key_loss, 5),
            target_key_loss=targets.key_loss,
            context=self._context,
            keys_read=round(found.keys_read, 4),
            text=text,
        )

    def spread(self, sparsities: Sequence[float]) -> list[DeltaUnits]:
        """Return the units that lose the least with each sparsity."""
        units, errors = self._measured()
        return [
            replace(units, num_groups=allocate(errors, COUNTS, 1 - sparsity))
            for sparsity in sparsities
        ]

    def _measured(self) -> tuple[DeltaUnits, NDArray[np.float32]]:
        """Return units with their scales and lifts, and each one's error with each number of groups."""
        import numpy as np

        spec = self._spec
        shape = (spec.num_layers, max(spec.num_kv_heads), spec.key_head_size)
        self._progress("measuring every layer's queries")
        units = DeltaUnits.uniform(*shape, FITTED_COUNT)
        _, squares = self._read_under(units, shape)
        units = replace(units, scales=scale_bytes(squares))
        self._progress("measuring what the scores of groups are lifted by")
        lifts = fitted_lifts(
            squares.max(axis=2),
            lambda lifts: self._read_under(replace(units, lifts=lifts), shape)[0],
        )
        errors = []
        for count in COUNTS:
            self._progress(f"measuring every layer with {count} groups of 64 keys")
            groups = ((count,) * shape[1],) * shape[0]
            units = replace(units, num_groups=groups, lifts=lifts)
            errors.append(self._read_under(units, shape)[0])
        # A layer with a sliding window is none to group, and keeps everything.
        found = np.where(np.stack(errors) < 0, np.inf, np.stack(errors))
        if not np.isfinite(found).any():
            raise NotCalibrated(
                f"no layer of {spec.name} sees the whole context: delta has nothing to group there"
            )
        return units, found

    def _read_under(
        self, units: DeltaUnits, shape: tuple[int, int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        replace(self._policy, units=units).install(self._hook, self._spec)
        self._hook.measure_groups()
        self._search.read_text()
        return self._hook.group_measures(*shape)

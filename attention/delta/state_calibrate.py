"""Finds the thresholds of each layer and KV head with which delta by blocks stays close to dense attention.

How much a unit loses with each of a few thresholds, and how much it sends, is measured on its own output,
while every layer attends to all keys; a sparsity is then spread so that the units lose the least together
(`cheapest`), and `SparsestPolicy` says which sparsity is harmless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lowtide.attention.calibrate import Targets
from lowtide.attention.calibration_file import NotCalibrated
from lowtide.attention.delta.block_policy import DeltaBlocks
from lowtide.attention.delta.sparsest import Candidate, Progress, SparsestPolicy
from lowtide.attention.delta.state_calibration import StateCalibration
from lowtide.attention.delta.state_units import LEFT_DENSE, StateUnits
from lowtide.attention.delta.units import cheapest
from lowtide.attention.graph_hook import GraphHook
from lowtide.attention.needles import Framing
from lowtide.models.model import Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

THRESHOLDS = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 0.9, 1.3, 2.0, 3.0)
"""As multiples of 1 over the root mean square of a query's channel: those that a unit may get, or 0."""
SPARSITIES = tuple(percent / 100 for percent in range(95, 10, -5))


class StateCalibrator:
    """Measures units on one model; arguments as for `Calibrator`. `policy` has the settings to keep."""

    def __init__(
        self,
        model: Model,
        hook: GraphHook,
        token_ids: Sequence[int],
        context: int,
        framing: Framing,
        policy: DeltaBlocks,
        progress: Progress = lambda _: None,
    ) -> None:
        self._spec, self._hook, self._policy = model.spec, hook, policy
        self._context, self._progress = context, progress
        self._search = SparsestPolicy(model, hook, token_ids, context, framing, progress)

    def calibration(self, targets: Targets, *, text: str) -> StateCalibration:
        """Return the sparsest units inside the targets, also on text and keys that the search did not see.

        Raises `NotCalibrated` where there are none.
        """
        of_sparsity = self.spread(SPARSITIES)
        candidates = [
            Candidate(replace(self._policy, units=units), units.sparsity or 0.0)
            for units in of_sparsity
        ]
        candidate, found = self._search.found(candidates, targets)
        return StateCalibration(
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

    def spread(self, sparsities: Sequence[float]) -> list[StateUnits]:
        """Return the units that lose the least with each sparsity, but those that no threshold reaches."""
        of_roots, errors, shares = self._measured()
        spread = (_spread(of_roots, errors, shares, 1 - sparsity) for sparsity in sparsities)
        return [units for units in spread if units is not None]

    def _measured(self) -> tuple[StateUnits, NDArray[np.float32], NDArray[np.float32]]:
        """Return units with their queries' roots, and each one's error with each threshold and the share
        that it sends; a unit that cannot have states has an infinite error."""
        import numpy as np

        spec = self._spec
        shape = (spec.num_layers, max(spec.num_kv_heads), spec.key_head_size)
        self._progress("measuring every layer's queries")
        units = StateUnits.uniform(*shape, block=self._policy.channels)
        _, _, squares = self._read_under(units, shape)
        nothing = np.zeros(shape[:2], np.float32)
        units = StateUnits.of_squares(squares, block=self._policy.channels, thresholds=nothing)
        errors, shares = [], []
        for threshold in THRESHOLDS:
            self._progress(f"measuring every layer with a threshold of {threshold:g}")
            error, share, _ = self._read_under(units.all_at(threshold), shape)
            errors.append(error)
            shares.append(share)
        found = np.where(np.stack(errors) < 0, np.inf, np.stack(errors))
        if not np.isfinite(found).any():
            raise NotCalibrated(
                f"no layer of {spec.name} sees the whole context: delta has nothing to skip there"
            )
        return units, found, np.stack(shares)

    def _read_under(
        self, units: StateUnits, shape: tuple[int, int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        replace(self._policy, units=units).install(self._hook, self._spec)
        self._hook.states.measure()
        self._search.read_text()
        return self._hook.states.measures(*shape)


def _spread(
    units: StateUnits, errors: NDArray[np.float32], shares: NDArray[np.float32], most: float
) -> StateUnits | None:
    """Return the units with thresholds that send no more than `most` at the least error; None where the
    largest ones send more. A unit that cannot have states is left dense, and does not count."""
    import numpy as np

    taking = np.isfinite(errors).all(axis=0)
    picked = cheapest(errors, shares, most)
    if picked is None:
        return None
    of_choices = np.array([*THRESHOLDS, 0.0])
    sent = np.take_along_axis(np.concatenate([shares, np.ones_like(shares[:1])]), picked[None], 0)
    thresholds = np.where(taking, of_choices[picked], LEFT_DENSE)
    return replace(
        units,
        thresholds=tuple(tuple(map(float, layer)) for layer in thresholds),
        sparsity=round(1 - float(sent[0][taking].mean()), 4),
    )

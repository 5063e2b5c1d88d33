"""Finds how much of each layer and KV head delta may group while it stays close to dense attention.

How much a unit loses with so many groups is measured on its own output, while every layer attends to all
keys, once each takes the lift that is best for it (`fit_score_bias`); a sparsity is then spread so that the
units lose the least together (`cheapest`), and `SparsestPolicy` says which sparsity is harmless.

Finds the thresholds of each layer and KV head with which delta by blocks stays close to dense attention.

How much a unit loses with each of a few thresholds, and how much it sends, is measured on its own output,
while every layer attends to all keys; a sparsity is then spread so that the units lose the least together
(`cheapest`), and `SparsestPolicy` says which sparsity is harmless.

SparsestPolicy: of policies, the sparsest that stays close to dense attention, end to end.

Errors of attention do not tell which sparsity is harmless, and a divergence averaged over a text not that a
digit is lost: both are held against dense attention, along a text and at pass keys hidden in it, none of
which may be lost that dense attention answers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.calibration import NotCalibrated
from lowtide.attention.delta.blocks import (
    LEFT_DENSE,
    DeltaBlocks,
    DeltaBlocksCalibration,
    HeadThresholds,
)
from lowtide.attention.delta.tokens import (
    Delta,
    DeltaCalibration,
    HeadGroups,
    allocate,
    cheapest,
    fit_score_bias,
    scale_bytes,
)
from lowtide.attention.evaluation.compare import Distances, EvalPositions
from lowtide.attention.evaluation.passkeys import Framing
from lowtide.attention.policy import AttentionPolicy
from lowtide.attention.tidal.calibrate import Targets
from lowtide.models.model import Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


MARGIN = 0.9
"""The search aims so far below the targets: it sees few tokens."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy and its share of what is not computed."""

    policy: AttentionPolicy
    sparsity: float


class SparsestPolicy:
    """Searches on one model; arguments as for `TidalSearch`."""

    def __init__(
        self,
        model: Model,
        hook: LlamaHook,
        token_ids: Sequence[int],
        context: int,
        framing: Framing,
        progress: Progress,
    ) -> None:
        half = len(token_ids) // 2
        self._model, self._context = model, context
        self._text = token_ids[:half]
        self._searched, self._held_out = (
            EvalPositions(model, hook, text, context, framing, seed, is_thorough=True)
            for seed, text in enumerate((token_ids[:half], token_ids[half:]))
        )
        self._progress = progress

    def read_text(self) -> None:
        """Read the text that is searched on, up to the context, under what the hook is set to."""
        self._model.truncate(0)
        text = self._text[: self._context]
        for at in range(0, len(text), self._model.batch_size):
            self._model.forward(text[at : at + self._model.batch_size])

    def found(
        self, candidates: Sequence[Candidate], targets: Targets
    ) -> tuple[Candidate, Distances]:
        """Return the first candidate, of ever less sparsity, that is inside the targets on text and keys
        that the search did not see, too.

        Raises `NotCalibrated` where there is none.
        """
        first = bisect_left(
            candidates,
            True,
            key=lambda one: self._distances(self._searched, one, targets, MARGIN) is not None,
        )
        for candidate in candidates[first:]:
            found = self._distances(self._held_out, candidate, targets)
            if found is not None:
                return candidate, found
        least = min(candidate.sparsity for candidate in candidates)
        raise NotCalibrated(
            f"no sparsity down to {least:.0%} keeps {self._model.spec.name} within a KL of {targets.kl} "
            f"and a loss of {targets.key_loss} at pass keys, with none of them lost: raise --target-kl or "
            "--target-key-loss, or use another policy"
        )

    def _distances(
        self, places: EvalPositions, candidate: Candidate, targets: Targets, margin: float = 1.0
    ) -> Distances | None:
        """Return how far a candidate is from dense attention; None where that is too far."""
        found = places.distances([candidate.policy])[0]
        self._progress(
            f"{'on other text: ' if margin == 1.0 else ''}sparsity {candidate.sparsity:.0%}: KL "
            f"{found.text.kl:.4f}, loss at pass keys {found.key_loss:.3f}, {found.keys_lost} of them lost, "
            f"reads {found.keys_read:.1%}"
        )
        is_close = found.text.kl <= targets.kl * margin
        keeps_keys = found.key_loss <= targets.key_loss * margin and not found.keys_lost
        return found if is_close and keeps_keys else None


COUNTS = (8, 12, 16, 24, 32, 40, 48, 56)
"""Of a page of 64: the numbers of groups that a unit may get."""
FITTED_COUNT = 32
"""Lifts are fitted with so many groups."""
SPARSITIES = (0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)


class DeltaSearch:
    """Measures units on one model; arguments as for `TidalSearch`. `policy` has the settings to keep."""

    def __init__(
        self,
        model: Model,
        hook: LlamaHook,
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

    def spread(self, sparsities: Sequence[float]) -> list[HeadGroups]:
        """Return the units that lose the least with each sparsity."""
        units, errors = self._measured()
        return [
            replace(units, num_groups=allocate(errors, COUNTS, 1 - sparsity))
            for sparsity in sparsities
        ]

    def _measured(self) -> tuple[HeadGroups, NDArray[np.float32]]:
        """Return units with their scales and lifts, and each one's error with each number of groups."""
        import numpy as np

        spec = self._spec
        shape = (spec.num_layers, max(spec.num_kv_heads), spec.key_head_dim)
        self._progress("measuring every layer's queries")
        units = HeadGroups.uniform(*shape, FITTED_COUNT)
        _, squares = self._read_under(units, shape)
        units = replace(units, scales=scale_bytes(squares))
        self._progress("measuring what the scores of groups are lifted by")
        score_bias = fit_score_bias(
            squares.max(axis=2),
            lambda score_bias: self._read_under(replace(units, score_bias=score_bias), shape)[0],
        )
        errors = []
        for count in COUNTS:
            self._progress(f"measuring every layer with {count} groups of 64 keys")
            groups = ((count,) * shape[1],) * shape[0]
            units = replace(units, num_groups=groups, score_bias=score_bias)
            errors.append(self._read_under(units, shape)[0])
        # A layer with a sliding window is none to group, and keeps everything.
        found = np.where(np.stack(errors) < 0, np.inf, np.stack(errors))
        if not np.isfinite(found).any():
            raise NotCalibrated(
                f"no layer of {spec.name} sees the whole context: delta has nothing to group there"
            )
        return units, found

    def _read_under(
        self, units: HeadGroups, shape: tuple[int, int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        replace(self._policy, units=units).install(self._hook, self._spec)
        self._hook.measure_groups()
        self._search.read_text()
        return self._hook.group_measures(*shape)


THRESHOLDS = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 0.9, 1.3, 2.0, 3.0)
"""As multiples of 1 over the root mean square of a query's channel: those that a unit may get, or 0."""
BLOCK_SPARSITIES = tuple(percent / 100 for percent in range(95, 10, -5))


class DeltaBlocksSearch:
    """Measures units on one model; arguments as for `TidalSearch`. `policy` has the settings to keep."""

    def __init__(
        self,
        model: Model,
        hook: LlamaHook,
        token_ids: Sequence[int],
        context: int,
        framing: Framing,
        policy: DeltaBlocks,
        progress: Progress = lambda _: None,
    ) -> None:
        self._spec, self._hook, self._policy = model.spec, hook, policy
        self._context, self._progress = context, progress
        self._search = SparsestPolicy(model, hook, token_ids, context, framing, progress)

    def calibration(self, targets: Targets, *, text: str) -> DeltaBlocksCalibration:
        """Return the sparsest units inside the targets, also on text and keys that the search did not see.

        Raises `NotCalibrated` where there are none.
        """
        of_sparsity = self.spread(BLOCK_SPARSITIES)
        candidates = [
            Candidate(replace(self._policy, units=units), units.sparsity or 0.0)
            for units in of_sparsity
        ]
        candidate, found = self._search.found(candidates, targets)
        return DeltaBlocksCalibration(
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

    def spread(self, sparsities: Sequence[float]) -> list[HeadThresholds]:
        """Return the units that lose the least with each sparsity, but those that no threshold reaches."""
        of_roots, errors, shares = self._measured()
        spread = (_spread(of_roots, errors, shares, 1 - sparsity) for sparsity in sparsities)
        return [units for units in spread if units is not None]

    def _measured(self) -> tuple[HeadThresholds, NDArray[np.float32], NDArray[np.float32]]:
        """Return units with their queries' roots, and each one's error with each threshold and the share
        that it sends; a unit that cannot have states has an infinite error."""
        import numpy as np

        spec = self._spec
        shape = (spec.num_layers, max(spec.num_kv_heads), spec.key_head_dim)
        self._progress("measuring every layer's queries")
        units = HeadThresholds.uniform(*shape, block=self._policy.channels)
        _, _, squares = self._read_under(units, shape)
        nothing = np.zeros(shape[:2], np.float32)
        units = HeadThresholds.of_squares(squares, block=self._policy.channels, thresholds=nothing)
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
        self, units: HeadThresholds, shape: tuple[int, int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        replace(self._policy, units=units).install(self._hook, self._spec)
        self._hook.states.measure()
        self._search.read_text()
        return self._hook.states.measures(*shape)


def _spread(
    units: HeadThresholds, errors: NDArray[np.float32], shares: NDArray[np.float32], most: float
) -> HeadThresholds | None:
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

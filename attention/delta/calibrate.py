"""Finds how much each layer and KV head may merge while delta stays close to dense attention.

The error of a head with each choice (a number of groups, or a threshold) is measured on its own output,
while every layer attends to all keys. A sparsity is then spread over the heads so that their errors are
smallest together (`head_params.cheapest`). Errors of attention do not tell which sparsity is harmless, and a
divergence averaged over a text does not show that a digit is lost. So the candidates are compared with dense
attention end to end, along a text and at passkeys hidden in it; no passkey that dense attention answers may
be lost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lowtide.attention.calibration import Calibration, NotCalibrated
from lowtide.attention.calibrator import (
    MARGIN,
    CalibrationContext,
    CalibrationRequest,
    Calibrator,
    Targets,
)
from lowtide.attention.delta.blocks import LEFT_DENSE, HeadThresholds
from lowtide.attention.delta.groups import HeadGroups, allocate, fit_score_bias
from lowtide.attention.delta.head_params import PAGE_KEYS, HeadParams, cheapest, scale_bytes
from lowtide.attention.evaluation.compare import Distances, EvalPositions, divergence_metrics
from lowtide.attention.evaluation.divergence import WINDOW_TOKENS
from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.plan.attention import AttentionMemory
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COUNTS = (8, 12, 16, 24, 32, 40, 48, 56)
"""Numbers of groups, of a page of 64 keys, that a KV head may get."""
FITTED_COUNT = 32
"""The score bias is fitted with so many groups."""
GROUP_SPARSITIES = (0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
THRESHOLDS = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 0.9, 1.3, 2.0, 3.0)
"""Thresholds that a KV head may get beside 0, as multiples of 1 over the rms of a query's channel."""
BLOCK_SPARSITIES = tuple(percent / 100 for percent in range(95, 10, -5))

MakePolicy = Callable[[HeadParams], AttentionPolicy]
"""Makes the policy of head parameters, with the settings that are calibrated."""


class DeltaCalibrator(Calibrator):
    """Finds delta's parameters; `channels` None: groups of whole keys."""

    compared_tokens = WINDOW_TOKENS

    def __init__(
        self,
        make_policy: MakePolicy,
        key: str,
        usage: str,
        channels: int | None,
        *,
        fixed_setting: str | None,
    ) -> None:
        self._make_policy = make_policy
        self._key, self._usage = key, usage
        self._channels = channels
        self._fixed_setting = fixed_setting

    @property
    def usage(self) -> str:
        """The policy with its granularity."""
        return self._usage

    def check(self, spec: ModelSpec, request: CalibrationRequest) -> None:
        """Raise `BadOption` for a setting that the search finds, or a model that delta cannot run."""
        if self._fixed_setting is not None:
            raise BadOption(
                f"calibrate finds delta's {self._fixed_setting}: leave {self._fixed_setting} out"
            )
        self._largest(spec).resolve(spec)

    def memory(self, spec: ModelSpec) -> AttentionMemory:
        """Return the memory with something merged in every layer and head."""
        return self._largest(spec).resolve(spec).memory

    def _largest(self, spec: ModelSpec) -> AttentionPolicy:
        shape = (spec.num_layers, max(spec.num_kv_heads), spec.key_head_dim)
        if self._channels is None:
            return self._make_policy(HeadGroups.uniform(*shape, PAGE_KEYS - 1))
        return self._make_policy(HeadThresholds.uniform(*shape, block=self._channels))

    def search(self, context: CalibrationContext, request: CalibrationRequest) -> Calibration:
        """Search for the sparsest parameters inside the targets."""
        search = HeadwiseSearch(context, self._make_policy)
        candidates: Sequence[HeadParams]
        if self._channels is None:
            candidates = spread_groups(search, GROUP_SPARSITIES)
        else:
            candidates = spread_thresholds(search, BLOCK_SPARSITIES, self._channels)
        params, found = search.sparsest(candidates, request.targets)
        metrics = divergence_metrics(
            found.text.kl, found.key_loss, found.keys_read, request.targets
        )
        metrics["sparsity"] = round(params.sparsity or 0.0, 4)
        return context.calibration(self._key, metrics, params.to_params())

    def describe(self, calibration: Calibration) -> str:
        """Describe the sparsity and the losses."""
        metrics = calibration.metrics
        return (
            f"sparsity {metrics['sparsity']:.1%} behind the window: KL {metrics['kl']:.4f} at "
            f"{calibration.context:,} tokens, passkey loss {metrics['key_loss']:.3f}; a token attends to "
            f"{metrics['keys_read']:.1%} of the cached keys (a group counts once)"
        )


class HeadwiseSearch:
    """Measures the heads of one model, and compares candidates with dense attention end to end."""

    def __init__(self, context: CalibrationContext, make_policy: MakePolicy) -> None:
        self.spec, self.hook = context.model.spec, context.hook
        self.progress = context.progress
        self._model, self._context = context.model, context.context
        self._make_policy = make_policy
        self._text = context.halves[0]
        self._searched, self._held_out = (
            EvalPositions.of(context, text, seed, is_thorough=True)
            for seed, text in enumerate(context.halves)
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, kv_heads, head_dim)."""
        return self.spec.num_layers, max(self.spec.num_kv_heads), self.spec.key_head_dim

    def read_under(self, params: HeadParams, measure: Callable[[], None]) -> None:
        """Read the text that is searched on, up to the context, while `measure` measures `params`."""
        self._make_policy(params).resolve(self.spec).configure(self.hook, self.spec)
        measure()
        self._model.truncate(0)
        text = self._text[: self._context]
        for at in range(0, len(text), self._model.batch_size):
            self._model.forward(text[at : at + self._model.batch_size])

    def sparsest(
        self, candidates: Sequence[HeadParams], targets: Targets
    ) -> tuple[HeadParams, Distances]:
        """Return the first of `candidates`, ordered by falling sparsity, that is inside the targets.

        It must hold on text and passkeys that the search did not see, too. Raises `NotCalibrated` if none
        does.
        """
        first = bisect_left(
            candidates,
            True,
            key=lambda params: self._distances(self._searched, params, targets, MARGIN) is not None,
        )
        for params in candidates[first:]:
            found = self._distances(self._held_out, params, targets)
            if found is not None:
                return params, found
        least = min(params.sparsity or 0.0 for params in candidates)
        raise NotCalibrated(
            f"no sparsity down to {least:.0%} keeps {self.spec.name} within a KL of {targets.kl} and a "
            f"passkey loss of {targets.key_loss} with no passkey lost: raise --target-kl or "
            "--target-key-loss, or use another policy"
        )

    def _distances(
        self, positions: EvalPositions, params: HeadParams, targets: Targets, margin: float = 1.0
    ) -> Distances | None:
        """Return the distance of a candidate from dense attention; None if it is outside the targets."""
        found = positions.distances([self._make_policy(params)])[0]
        self.progress(
            f"{'on other text: ' if margin == 1.0 else ''}sparsity {params.sparsity or 0.0:.0%}: KL "
            f"{found.text.kl:.4f}, passkey loss {found.key_loss:.3f}, {found.keys_lost} passkeys lost, "
            f"reads {found.keys_read:.1%}"
        )
        is_close = found.text.kl <= targets.kl * margin
        keeps_keys = found.key_loss <= targets.key_loss * margin and not found.keys_lost
        return found if is_close and keeps_keys else None


def spread_groups(search: HeadwiseSearch, sparsities: Sequence[float]) -> list[HeadGroups]:
    """Return, for each sparsity, the numbers of groups with the least error."""
    params, errors = _measured_groups(search)
    return [
        replace(params, num_groups=allocate(errors, COUNTS, 1 - sparsity))
        for sparsity in sparsities
    ]


def _measured_groups(search: HeadwiseSearch) -> tuple[HeadGroups, NDArray[np.float32]]:
    """Return parameters with scales and score bias, and each head's error with each of `COUNTS` groups."""
    num_layers, num_kv_heads, _ = search.shape

    def measured(params: HeadGroups) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        search.read_under(params, search.hook.measure_groups)
        return search.hook.group_measures(*search.shape)

    search.progress("measuring every layer's queries")
    params = HeadGroups.uniform(*search.shape, FITTED_COUNT)
    _, squares = measured(params)
    params = replace(params, scales=scale_bytes(squares))
    search.progress("fitting the score bias of groups")
    score_bias = fit_score_bias(
        squares.max(axis=2), lambda bias: measured(replace(params, score_bias=bias))[0]
    )
    params = replace(params, score_bias=score_bias)
    errors = []
    for count in COUNTS:
        search.progress(f"measuring every layer with {count} groups of 64 keys")
        counts = ((count,) * num_kv_heads,) * num_layers
        errors.append(measured(replace(params, num_groups=counts))[0])
    return params, _checked_errors(search, errors)


def spread_thresholds(
    search: HeadwiseSearch, sparsities: Sequence[float], block: int
) -> list[HeadThresholds]:
    """Return, for each sparsity that some thresholds reach, the thresholds with the least error."""
    params, errors, shares = _measured_thresholds(search, block)
    spread = (_spread(params, errors, shares, 1 - sparsity) for sparsity in sparsities)
    return [found for found in spread if found is not None]


def _measured_thresholds(
    search: HeadwiseSearch, block: int
) -> tuple[HeadThresholds, NDArray[np.float32], NDArray[np.float32]]:
    """Return parameters with the queries' rms, and each head's error and stored share with each of
    `THRESHOLDS`; the error of a head that cannot be merged is infinite."""
    import numpy as np

    def measured(params: HeadThresholds) -> tuple[NDArray[np.float32], ...]:
        search.read_under(params, search.hook.blocks.measure)
        return search.hook.blocks.measures(*search.shape)

    search.progress("measuring every layer's queries")
    *_, squares = measured(HeadThresholds.uniform(*search.shape, block=block))
    zeros = np.zeros(search.shape[:2], np.float32)
    params = HeadThresholds.of_squares(squares, block=block, thresholds=zeros)
    errors, shares = [], []
    for threshold in THRESHOLDS:
        search.progress(f"measuring every layer with a threshold of {threshold:g}")
        error, share, _ = measured(params.all_at(threshold))
        errors.append(error)
        shares.append(share)
    return params, _checked_errors(search, errors), np.stack(shares)


def _checked_errors(
    search: HeadwiseSearch, errors: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return errors (choices, layers, kv_heads), infinite for layers with a sliding window.

    Raises `NotCalibrated` if no layer can be merged.
    """
    import numpy as np

    found: NDArray[np.float32] = np.where(np.stack(errors) < 0, np.inf, np.stack(errors))
    if not np.isfinite(found).any():
        raise NotCalibrated(
            f"no layer of {search.spec.name} sees the whole context, so delta has nothing to merge"
        )
    return found


def _spread(
    params: HeadThresholds, errors: NDArray[np.float32], shares: NDArray[np.float32], most: float
) -> HeadThresholds | None:
    """Return thresholds that store at most the share `most` at the least error; None if none do.

    Heads with infinite errors stay dense, and do not count.
    """
    import numpy as np

    counts = np.isfinite(errors).all(axis=0)
    picked = cheapest(errors, shares, most)
    if picked is None:
        return None
    choices = np.array([*THRESHOLDS, 0.0])
    stored = np.take_along_axis(np.concatenate([shares, np.ones_like(shares[:1])]), picked[None], 0)
    thresholds = np.where(counts, choices[picked], LEFT_DENSE)
    return replace(
        params,
        thresholds=tuple(tuple(map(float, layer)) for layer in thresholds),
        sparsity=round(1 - float(stored[0][counts].mean()), 4),
    )

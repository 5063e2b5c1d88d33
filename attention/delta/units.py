"""DeltaUnits: how much is grouped in each layer and KV head, and by what measure of likeness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowtide.attention.delta.lifts import Lifts
from lowtide.memory.key_groups import PAGE_KEYS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_GROUPS = 8
FULL_SCALE = 255
STEPS = 8 * PAGE_KEYS
"""In which what a unit keeps is shared out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaUnits:
    """Of every layer and KV head, `num_groups` of a page of 64 keys (64: none is grouped), and `scales`,
    a byte a channel: how much it counts in the distance of two keys, against the unit's other channels.
    `lifts` times the mean square of a group's distances from its mean is added to its scores (as if scores
    were not scaled): see `fitted_lifts`; 0 where queries are not known.
    """

    num_groups: tuple[tuple[int, ...], ...]
    lifts: Lifts
    scales: tuple[tuple[bytes, ...], ...]

    @staticmethod
    def uniform(num_layers: int, num_kv_heads: int, key_size: int, num_groups: int) -> DeltaUnits:
        """Return units that are all grouped alike, with channels that all count alike."""
        return DeltaUnits(
            num_groups=((num_groups,) * num_kv_heads,) * num_layers,
            lifts=((0.0,) * num_kv_heads,) * num_layers,
            scales=((bytes([FULL_SCALE]) * key_size,) * num_kv_heads,) * num_layers,
        )

    @property
    def sparsity(self) -> float:
        """The share of the keys of grouped pages that cost nothing, a mean of the units."""
        counts = [count for layer in self.num_groups for count in layer]
        return 1 - sum(counts) / (PAGE_KEYS * len(counts))

    def grouped(self) -> tuple[int, ...]:
        """Return the numbers of groups of all heads of layers that have groups."""
        return tuple(count for layer in self.grouped_layers() for count in self.num_groups[layer])

    def grouped_layers(self) -> tuple[int, ...]:
        """Return the layers that have groups."""
        return tuple(
            layer for layer, counts in enumerate(self.num_groups) if min(counts) < PAGE_KEYS
        )

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
        """Return groups and lifts, (layers, kv_heads), and scales, (layers, kv_heads, key_size)."""
        import numpy as np

        scales = np.array([[list(unit) for unit in layer] for layer in self.scales]) / FULL_SCALE
        return (
            np.array(self.num_groups, np.uint8),
            np.array(self.lifts, np.float32),
            scales.astype(np.float32),
        )


def scale_bytes(squares: NDArray[np.float32]) -> tuple[tuple[bytes, ...], ...]:
    """Return scales from the mean squares of queries' channels, (layers, kv_heads, key_size)."""
    import numpy as np

    roots = np.sqrt(squares)
    most = np.maximum(roots.max(axis=2, keepdims=True), 1e-30)
    found = np.maximum(np.round(roots / most * FULL_SCALE), 1).astype(np.uint8)
    return tuple(tuple(unit.tobytes() for unit in layer) for layer in found)


def allocate(
    errors: NDArray[np.float32], choices: tuple[int, ...], share: float
) -> tuple[tuple[int, ...], ...]:
    """Return how many groups each unit gets, so that all keep `share` of the keys at the least error.

    `errors` (choices, layers, kv_heads) are each unit's with so many groups, of ascending `choices`; with
    all 64 there is none. A unit whose errors are infinite keeps everything, and does not count.
    """
    import numpy as np

    shares = np.broadcast_to(np.array(choices)[:, None, None] / PAGE_KEYS, errors.shape)
    picked = cheapest(np.minimum.accumulate(errors, axis=0), shares, share)
    assert picked is not None, "no unit takes part, or a share below the smallest choice is wanted"
    counts = np.array([*choices, PAGE_KEYS])
    return tuple(tuple(map(int, layer)) for layer in counts[picked])


def cheapest(
    errors: NDArray[np.float32], shares: NDArray[np.floating[Any]], most: float
) -> NDArray[np.intp] | None:
    """Return which choice each unit takes, (layers, kv_heads), so that all keep `most` at the least error.

    `errors` and `shares` (choices, layers, kv_heads) are what each unit loses and keeps with a choice; one
    more keeps everything and loses nothing. The least there is, by dynamic programming over what the units
    up to each one keep, in steps of `1 / STEPS`, rounded up. A unit whose errors are infinite does not
    count. None where the smallest choices keep more.
    """
    import numpy as np

    taking = np.isfinite(errors).all(axis=0)
    costs = np.concatenate([errors, np.zeros_like(errors[:1])])[:, taking].astype(np.float64)
    kept = np.concatenate([shares, np.ones_like(shares[:1])])[:, taking]
    steps = np.ceil(kept * STEPS - 1e-6).astype(int)
    num_units = int(taking.sum())
    room = int(most * STEPS * num_units + 1e-6)
    least, choices = np.zeros(room + 1), []
    for unit in range(num_units):
        of_choices = np.full((len(costs), room + 1), np.inf)
        for choice, step in enumerate(steps[:, unit].tolist()):
            of_choices[choice, step:] = least[: max(room + 1 - step, 0)] + costs[choice, unit]
        choices.append(of_choices.argmin(axis=0))
        least = of_choices.min(axis=0)
    if not num_units or not np.isfinite(least[room]):
        return None
    of_units = np.zeros(num_units, np.intp)
    for unit in reversed(range(num_units)):
        of_units[unit] = choices[unit][room]
        room -= int(steps[of_units[unit], unit])
    found = np.full(taking.shape, len(errors), np.intp)
    found[taking] = of_units
    return found

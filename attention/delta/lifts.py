"""How much the scores of what stands for several keys are lifted, in each layer and KV head.

A group that is seen as its mean m gets the weight exp(q m), and the mean of its keys' own weights is more
(Jensen). Were their scores normal, by a factor of exp of half their variance, which is the queries' mean
squares times the keys', channel by channel. They are not, least of all to a query that looks for one of the
keys; so each unit takes the share of that with which its own output was nearest to dense attention. Not in
the paper, as far as it is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHARES = (0.0, 0.06, 0.12, 0.2, 0.3, 0.45, 0.7, 1.0)

Lifts = tuple[tuple[float, ...], ...]
"""Of each layer and KV head."""


def fitted_lifts(
    squares: NDArray[np.float32], errors_with: Callable[[Lifts], NDArray[np.float32]]
) -> Lifts:
    """Return each unit's lift; `squares` (layers, kv_heads) are the mean squares of its queries' largest
    channel, and `errors_with` measures the units' errors, of that shape, with lifts."""
    import numpy as np

    offered = [_told(np.float32(share / 2) * squares) for share in SHARES]
    picked = np.stack([errors_with(lifts) for lifts in offered]).argmin(axis=0)
    return tuple(
        tuple(offered[choice][layer][head] for head, choice in enumerate(choices))
        for layer, choices in enumerate(picked)
    )


def _told(lifts: NDArray[np.float32]) -> Lifts:
    """Rounded as a calibration's file has them."""
    return tuple(tuple(float(f"{lift:.4g}") for lift in layer) for layer in lifts)

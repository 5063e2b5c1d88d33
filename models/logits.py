"""Whether the logits of a pass are numbers: a damaged or badly quantised model has others."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D

NOT_NUMBERS = "the model's logits are not numbers"
ADVICE = "the file is damaged or badly quantised: download it again, or another quantisation"


def are_numbers(logits: Logits | Logits2D) -> bool:
    """Return whether every row of `logits`, shape (..., vocabulary), has numbers, in one read of them.

    The largest value of a row is NaN where any is, and infinite where one is or all are -inf. Tokens that a model
    masks have -inf, which is legal beside numbers.
    """
    import numpy as np

    return not logits.size or bool(np.isfinite(logits.max(axis=-1)).all())

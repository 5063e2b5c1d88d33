"""SparsestPolicy: of policies, the sparsest that stays close to dense attention, end to end.

Errors of attention do not tell which sparsity is harmless, and a divergence averaged over a text not that a
digit is lost: both are held against dense attention, along a text and at pass keys hidden in it, none of
which may be lost that dense attention answers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowtide.attention.calibrate import Targets
from lowtide.attention.calibration_file import NotCalibrated
from lowtide.attention.graph_hook import GraphHook
from lowtide.attention.needles import Framing
from lowtide.attention.places import Distances, Places
from lowtide.attention.policy import AttentionPolicy
from lowtide.models.model import Model

MARGIN = 0.9
"""The search aims so far below the targets: it sees few tokens."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy and its share of what is not computed."""

    policy: AttentionPolicy
    sparsity: float


class SparsestPolicy:
    """Searches on one model; arguments as for `Calibrator`."""

    def __init__(
        self,
        model: Model,
        hook: GraphHook,
        token_ids: Sequence[int],
        context: int,
        framing: Framing,
        progress: Progress,
    ) -> None:
        half = len(token_ids) // 2
        self._model, self._context = model, context
        self._text = token_ids[:half]
        self._searched, self._held_out = (
            Places(model, hook, text, context, framing, seed, is_thorough=True)
            for seed, text in enumerate((token_ids[:half], token_ids[half:]))
        )
        self._progress = progress

    def read_text(self) -> None:
        """Read the text that is searched on, up to the context, under what the hook is set to."""
        self._model.truncate(0)
        text = self._text[: self._context]
        for at in range(0, len(text), self._model.max_rows):
            self._model.forward(text[at : at + self._model.max_rows])

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
        self, places: Places, candidate: Candidate, targets: Targets, margin: float = 1.0
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

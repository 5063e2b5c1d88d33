"""Finds the selection layers and k that keep TidalDecode close to dense attention at the lowest cost.

A greedy search: it begins with an early layer, so that nearly all other layers can read less, and adds the
layer that lowers the loss most, along a text and at passkeys hidden in it. Each set of layers is tried with
every k. Of the settings inside the targets it takes the one that reads the fewest keys, if that holds on
text and passkeys that the search did not see. The paper picks its one re-selection layer by hand (arXiv
2410.05076, section 3.2); this search is lowtide's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lowtide.attention.calibration import Calibration, NotCalibrated
from lowtide.attention.calibrator import (
    MARGIN,
    CalibrationContext,
    CalibrationRequest,
    Calibrator,
    Targets,
)
from lowtide.attention.evaluation.compare import EvalPositions, divergence_metrics
from lowtide.attention.evaluation.divergence import WINDOW_TOKENS
from lowtide.attention.policy import AttentionPolicy
from lowtide.memory.plan.attention import AttentionMemory
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

KEY = "tidal"
K_CHOICES = (1536, 1280, 1024, 768, 512, 384, 256)
EARLY_SHARE = 0.1
"""How much more than the cheapest the first selection layer may cost, as a share of the keys."""

MakePolicy = Callable[[int, tuple[int, ...]], AttentionPolicy]
"""Makes the policy of k and selection layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Selection layers and k, with what they measured; `keys_read` is a share of the cached keys."""

    selection_layers: tuple[int, ...]
    k: int
    kl: float = 0.0
    key_loss: float = 0.0
    keys_read: float = 1.0

    def __str__(self) -> str:
        layers = "+".join(map(str, self.selection_layers))
        return (
            f"k {self.k}, selection layers {layers}: KL {self.kl:.4f}, "
            f"passkey loss {self.key_loss:.3f}, reads {self.keys_read:.1%}"
        )

    def is_inside(self, targets: Targets, margin: float = 1.0) -> bool:
        """Whether both losses are below `margin` times their targets."""
        return self.kl <= targets.kl * margin and self.key_loss <= targets.key_loss * margin

    def excess(self, targets: Targets) -> float:
        """Return the sum of both losses, each as a multiple of its target."""
        return self.kl / targets.kl + self.key_loss / targets.key_loss


class TidalCalibrator(Calibrator):
    """Finds selection layers and k; `selection_layers` that the user chose are not searched for."""

    options = ("target_kl", "target_key_loss", "max_layers", "k")
    compared_tokens = WINDOW_TOKENS
    usage = KEY

    def __init__(
        self,
        make_policy: MakePolicy,
        selection_layers: tuple[int, ...] | None,
        *,
        has_other_settings: bool,
    ) -> None:
        self._make_policy = make_policy
        self._selection_layers = selection_layers
        self._has_other_settings = has_other_settings

    def check(self, spec: ModelSpec, request: CalibrationRequest) -> None:
        """Raise `BadOption` for settings other than layers, or layers that the model does not have."""
        if self._has_other_settings:
            raise BadOption(
                "calibrate searches for tidal's settings: leave all of them out but layers (--k says which "
                "k to try)"
            )
        if self._selection_layers is not None:
            self._make_policy(max(K_CHOICES), self._selection_layers).resolve(spec)

    def memory(self, spec: ModelSpec) -> AttentionMemory:
        """Return the memory of selection in every layer."""
        return self._make_policy(max(K_CHOICES), tuple(range(spec.num_layers))).memory

    def search(self, context: CalibrationContext, request: CalibrationRequest) -> Calibration:
        """Search for the cheapest setting inside the targets."""
        search = TidalSearch(context, self._make_policy)
        ks = request.k_choices or tuple(k for k in K_CHOICES if k <= context.context // 4)
        if self._selection_layers is None:
            best = search.best(request.targets, request.max_layers, ks)
        else:
            best = search.of_layers(request.targets, self._selection_layers, ks)
        return context.calibration(
            KEY,
            divergence_metrics(best.kl, best.key_loss, best.keys_read, request.targets),
            {"k": best.k, "selection_layers": list(best.selection_layers)},
        )

    def describe(self, calibration: Calibration) -> str:
        """Describe the setting and its losses."""
        layers = ", ".join(map(str, calibration.params["selection_layers"]))
        metrics = calibration.metrics
        return (
            f"k {calibration.params['k']}, selection layers {layers}: KL {metrics['kl']:.4f} at "
            f"{calibration.context:,} tokens, passkey loss {metrics['key_loss']:.3f}; a token attends to "
            f"{metrics['keys_read']:.1%} of the cached keys"
        )


class TidalSearch:
    """Searches one model for selection layers and k."""

    def __init__(self, context: CalibrationContext, make_policy: MakePolicy) -> None:
        self._searched, self._held_out = (
            EvalPositions.of(context, text, seed) for seed, text in enumerate(context.halves)
        )
        self._make_policy = make_policy
        self._spec = context.model.spec
        self._progress = context.progress

    def best(self, targets: Targets, max_layers: int, k_choices: Sequence[int]) -> Candidate:
        """Return the cheapest setting inside the targets, also on text that the search did not see.

        Raises `NotCalibrated` if `max_layers` layers have none.
        """
        candidates = sorted(self._inside(targets, max_layers, k_choices), key=lambda c: c.keys_read)
        for candidate in candidates:
            held_out = self._measured(self._held_out, [candidate])[0]
            self._progress(f"on other text: {held_out}")
            if held_out.is_inside(targets):
                return held_out
        raise NotCalibrated(
            f"no {max_layers} selection layers with k up to {max(k_choices)} keep {self._spec.name} within "
            f"a KL of {targets.kl} and a passkey loss of {targets.key_loss}: raise --target-kl, "
            "--target-key-loss, --max-layers or --k"
        )

    def of_layers(
        self, targets: Targets, layers: Sequence[int], k_choices: Sequence[int]
    ) -> Candidate:
        """Return the smallest k that keeps these layers inside the targets, on text not searched on.

        Raises `NotCalibrated` if none does.
        """
        candidates = [Candidate(selection_layers=tuple(layers), k=k) for k in sorted(k_choices)]
        for held_out in self._measured(self._held_out, candidates):
            self._progress(f"on other text: {held_out}")
            if held_out.is_inside(targets):
                return held_out
        raise NotCalibrated(
            f"selection layers {'+'.join(map(str, layers))} with k up to {max(k_choices)} do not keep "
            f"{self._spec.name} within a KL of {targets.kl} and a passkey loss of {targets.key_loss}: "
            "name more layers, or raise --target-kl, --target-key-loss or --k"
        )

    def _inside(
        self, targets: Targets, max_layers: int, k_choices: Sequence[int]
    ) -> Iterator[Candidate]:
        """Yield the sets of layers on the greedy path, with each k that is inside the targets."""
        layers: tuple[int, ...] = ()
        for _ in range(max_layers):
            best = self._extended(layers, max(k_choices), targets)
            if best is None:
                return
            layers = best.selection_layers
            self._progress(str(best))
            if best.is_inside(targets, MARGIN):
                smaller = [replace(best, k=k) for k in k_choices if k < best.k]
                yield best
                measured = self._measured(self._searched, smaller)
                yield from (c for c in measured if c.is_inside(targets, MARGIN))

    def _extended(self, layers: tuple[int, ...], k: int, targets: Targets) -> Candidate | None:
        """Return the best set with one more layer, of those that let some layers read less."""
        candidates = [
            Candidate(selection_layers=tuple(sorted((*layers, layer))), k=k)
            for layer in range(min(layers, default=0), self._spec.num_layers - 1)
            if layer not in layers
        ]
        sparse = [c for c in self._measured(self._searched, candidates) if c.keys_read < 1]
        if not layers:
            cheapest = min((candidate.keys_read for candidate in sparse), default=0.0)
            sparse = [c for c in sparse if c.keys_read <= cheapest + EARLY_SHARE]
        return min(sparse, key=lambda candidate: candidate.excess(targets), default=None)

    def _measured(
        self, positions: EvalPositions, candidates: Sequence[Candidate]
    ) -> list[Candidate]:
        """Measure every candidate at all positions of one of the texts."""
        policies = [self._make_policy(c.k, c.selection_layers) for c in candidates]
        return [
            replace(candidate, kl=found.text.kl, key_loss=found.key_loss, keys_read=found.keys_read)
            for candidate, found in zip(candidates, positions.distances(policies), strict=True)
        ]

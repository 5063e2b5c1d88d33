"""Finds the selection layers and k that keep TidalDecode close to dense attention at the lowest cost.

A greedy search: an early layer begins, so that nearly all of the others can read less; the layer that
lowers most what is lost, along a text and at pass keys hidden in it, joins, one after another; each set
of layers is tried with every k. Of all that stay inside the targets, the one that reads the fewest keys
wins, if it holds on text and keys that the search did not see. The paper picks its one re-selection layer
by hand (arXiv 2410.05076, section 3.2); this search is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lowtide.attention.bindings.llama_hook import LlamaHook
from lowtide.attention.calibration import NotCalibrated
from lowtide.attention.evaluation.compare import EvalPositions
from lowtide.attention.evaluation.passkeys import Framing
from lowtide.attention.tidal.policy import Tidal
from lowtide.models.model import Model

K_CHOICES = (1536, 1280, 1024, 768, 512, 384, 256)
MARGIN = 0.9
"""The search aims so far below the target: it sees few tokens, and picks the luckiest."""
EARLY_SHARE = 0.1
"""The first selection layer may cost so much more, as a share of the keys, than the cheapest."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Targets:
    """What may be lost, as means: `kl` from dense attention along a text, in nats a token, and `key_loss`
    of the log likelihood of a pass key hidden in it, in nats a key."""

    kl: float
    key_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A choice of layers and k with what it measured; `keys_read` is a share of the cached keys."""

    selection_layers: tuple[int, ...]
    k: int
    kl: float = 0.0
    key_loss: float = 0.0
    keys_read: float = 1.0

    def __str__(self) -> str:
        layers = "+".join(map(str, self.selection_layers))
        return (
            f"k {self.k}, selection layers {layers}: KL {self.kl:.4f}, "
            f"loss at pass keys {self.key_loss:.3f}, reads {self.keys_read:.1%}"
        )

    def is_inside(self, targets: Targets, margin: float = 1.0) -> bool:
        """Whether both stay below a share of their targets."""
        return self.kl <= targets.kl * margin and self.key_loss <= targets.key_loss * margin

    def excess(self, targets: Targets) -> float:
        """Return what the search lowers: both, each as a multiple of its target."""
        return self.kl / targets.kl + self.key_loss / targets.key_loss


class TidalSearch:
    """Measures settings on one model; `token_ids` are a text of at least `context` + 1 tokens twice over.

    The first half is searched on, the second is what a choice is held against; `framing` puts the question
    for a hidden key.
    """

    def __init__(
        self,
        model: Model,
        hook: LlamaHook,
        token_ids: Sequence[int],
        context: int,
        framing: Framing,
        progress: Progress = lambda _: None,
    ) -> None:
        half = len(token_ids) // 2
        self._searched, self._held_out = (
            EvalPositions(model, hook, text, context, framing, seed)
            for seed, text in enumerate((token_ids[:half], token_ids[half:]))
        )
        self._spec = model.spec
        self._progress = progress

    def best(self, targets: Targets, max_layers: int, k_choices: Sequence[int]) -> Setting:
        """Return the cheapest setting inside the targets on text and keys that the search did not see.

        Raises `NotCalibrated` where there is none among `max_layers` layers.
        """
        candidates = sorted(self._inside(targets, max_layers, k_choices), key=lambda s: s.keys_read)
        for candidate in candidates:
            held_out = _measured(self._held_out, [candidate])[0]
            self._progress(f"on other text: {held_out}")
            if held_out.is_inside(targets):
                return held_out
        raise NotCalibrated(
            f"no {max_layers} selection layers with k up to {max(k_choices)} keep {self._spec.name} within "
            f"a KL of {targets.kl} and a loss of {targets.key_loss} at pass keys: raise --target-kl, "
            "--target-key-loss, --max-layers or --k"
        )

    def of_layers(
        self, targets: Targets, layers: Sequence[int], k_choices: Sequence[int]
    ) -> Setting:
        """Return the smallest k with which these selection layers hold, on what `best` holds its choice to.

        Raises `NotCalibrated` where none does.
        """
        settings = [Setting(selection_layers=tuple(layers), k=k) for k in sorted(k_choices)]
        for held_out in _measured(self._held_out, settings):
            self._progress(f"on other text: {held_out}")
            if held_out.is_inside(targets):
                return held_out
        raise NotCalibrated(
            f"selection layers {'+'.join(map(str, layers))} with k up to {max(k_choices)} do not keep "
            f"{self._spec.name} within a KL of {targets.kl} and a loss of {targets.key_loss} at pass keys: "
            "name more layers, or raise --target-kl, --target-key-loss or --k"
        )

    def _inside(
        self, targets: Targets, max_layers: int, k_choices: Sequence[int]
    ) -> Iterator[Setting]:
        """Yield every set of layers on the greedy path with every k that is inside the targets."""
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
                measured = _measured(self._searched, smaller)
                yield from (s for s in measured if s.is_inside(targets, MARGIN))

    def _extended(self, layers: tuple[int, ...], k: int, targets: Targets) -> Setting | None:
        """Return the best set of one layer more that still lets layers read less."""
        settings = [
            Setting(selection_layers=tuple(sorted((*layers, layer))), k=k)
            for layer in range(min(layers, default=0), self._spec.num_layers - 1)
            if layer not in layers
        ]
        sparse = [s for s in _measured(self._searched, settings) if s.keys_read < 1]
        if not layers:
            cheapest = min((setting.keys_read for setting in sparse), default=0.0)
            sparse = [s for s in sparse if s.keys_read <= cheapest + EARLY_SHARE]
        return min(sparse, key=lambda setting: setting.excess(targets), default=None)


def _measured(places: EvalPositions, settings: Sequence[Setting]) -> list[Setting]:
    """Measure every setting at all places of one of the texts."""
    policies = [Tidal(k=s.k, selection_layers=s.selection_layers) for s in settings]
    return [
        replace(setting, kl=found.text.kl, key_loss=found.key_loss, keys_read=found.keys_read)
        for setting, found in zip(settings, places.distances(policies), strict=True)
    ]

"""Finds the selection layers and k that keep TidalDecode close to dense attention at the lowest cost.

A greedy search: an early layer begins, so that nearly all of the others can read less; the layer that
lowers the divergence most joins, one after another; each set of layers is tried with every k. Of all that
stay inside the target, the one that reads the fewest keys wins, if it holds on text that the search did
not see. The paper picks its one re-selection layer by hand (arXiv 2410.05076, section 3.2);
this search is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lowtide.attention.dense import DenseSteering
from lowtide.attention.graph_hook import GraphHook
from lowtide.attention.policy import Steering
from lowtide.attention.quality import Distance, Reference
from lowtide.attention.tidal import Tidal
from lowtide.models.errors import LowtideError
from lowtide.models.model import Model

K_CHOICES = (1024, 768, 512, 384, 256)
MARGIN = 0.9
"""The search aims so far below the target: it sees few tokens, and picks the luckiest."""
NUM_PLACES = 3
EARLY_SHARE = 0.1
"""The first selection layer may cost so much more, as a share of the keys, than the cheapest."""
PLACE_STEP = 160
"""Tokens between the places that are compared."""

Progress = Callable[[str], None]


class NotCalibrated(LowtideError):
    """No setting stays inside the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A choice of layers and k with what it measured; `keys_read` is a share of the cached keys."""

    selection_layers: tuple[int, ...]
    k: int
    kl: float
    keys_read: float

    def __str__(self) -> str:
        layers = "+".join(map(str, self.selection_layers))
        return (
            f"k {self.k}, selection layers {layers}: KL {self.kl:.4f}, reads {self.keys_read:.1%}"
        )


class Calibrator:
    """Measures settings on one model; `token_ids` are a text of at least `context` + 1 tokens twice over.

    The first half is searched on, the second is what a choice is held against.
    """

    def __init__(
        self,
        model: Model,
        hook: GraphHook,
        token_ids: Sequence[int],
        context: int,
        progress: Progress = lambda _: None,
    ) -> None:
        self._model = model
        self._hook = hook
        self._dense = DenseSteering(hook)
        half = len(token_ids) // 2
        self._texts = (token_ids[:half], token_ids[half:])
        last = context - PLACE_STEP
        self._depths = [last - PLACE_STEP * i for i in reversed(range(NUM_PLACES))]
        self._progress = progress
        self._current: int | None = None

    def best(self, target_kl: float, max_layers: int, k_choices: Sequence[int]) -> Setting:
        """Return the cheapest setting inside the target on text that the search did not see.

        Raises `NotCalibrated` where there is none among `max_layers` layers.
        """
        candidates = sorted(
            self._inside(target_kl * MARGIN, max_layers, k_choices), key=lambda s: s.keys_read
        )
        for candidate in candidates:
            held_out = self._measured(1, [candidate])[0]
            self._progress(f"on other text: {held_out}")
            if held_out.kl <= target_kl:
                return held_out
        raise NotCalibrated(
            f"no {max_layers} selection layers with k up to {max(k_choices)} keep {self._model.spec.name} "
            f"within a KL of {target_kl}: raise --target-kl, --max-layers or --k"
        )

    def _inside(
        self, target_kl: float, max_layers: int, k_choices: Sequence[int]
    ) -> Iterator[Setting]:
        """Yield every set of layers on the greedy path with every k that is inside the target."""
        layers: tuple[int, ...] = ()
        for _ in range(max_layers):
            best = self._extended(layers, max(k_choices))
            if best is None:
                return
            layers = best.selection_layers
            self._progress(str(best))
            if best.kl <= target_kl:
                smaller = [replace(best, k=k) for k in k_choices if k < best.k]
                yield best
                yield from (s for s in self._measured(0, smaller) if s.kl <= target_kl)

    def _extended(self, layers: tuple[int, ...], k: int) -> Setting | None:
        """Return the best set of one layer more that still lets layers read less."""
        settings = [
            Setting(selection_layers=tuple(sorted((*layers, layer))), k=k, kl=0.0, keys_read=1.0)
            for layer in range(min(layers, default=0), self._model.spec.num_layers - 1)
            if layer not in layers
        ]
        sparse = [setting for setting in self._measured(0, settings) if setting.keys_read < 1]
        if not layers:
            cheapest = min((setting.keys_read for setting in sparse), default=0.0)
            sparse = [s for s in sparse if s.keys_read <= cheapest + EARLY_SHARE]
        return min(sparse, key=lambda setting: setting.kl, default=None)

    def _measured(self, text: int, settings: Sequence[Setting]) -> list[Setting]:
        """Measure every setting at every place of one of the texts."""
        self._turn_to(text)
        totals = [Distance() for _ in settings]
        shares = [0.0 for _ in settings]
        for depth in self._depths:
            place = Reference(self._model, self._dense, self._texts[text], depth)
            for index, setting in enumerate(settings):
                before = self._hook.counts()
                totals[index] += place.distance(self._steering(setting))
                after = self._hook.counts()
                held = after.keys_held - before.keys_held
                shares[index] += (after.keys_read - before.keys_read) / held / len(self._depths)
        return [
            replace(setting, kl=total.kl, keys_read=share)
            for setting, total, share in zip(settings, totals, shares, strict=True)
        ]

    def _turn_to(self, text: int) -> None:
        """Empty the cache where it holds the other text."""
        if text != self._current:
            self._model.truncate(0)
            self._current = text

    def _steering(self, setting: Setting) -> Steering:
        spec = self._model.spec
        policy = Tidal(k=setting.k, selection_layers=setting.selection_layers)
        return policy.fitted(spec).install(self._hook, spec)

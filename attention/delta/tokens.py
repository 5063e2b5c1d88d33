"""DeltaLLM's attention in our form: keys behind a window that are alike share one score and one value.

Qi et al., "DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM
Inference", arXiv 2507.19608, computes scores from what changed between keys, outside a local window. Its
construction rule is not published. Ours reuses whole rows, with changes that measured better: a row is not
compared with the last one that was sent but joins the likest rows of its page of 64, by key and value; what
stands for a group is its mean, in the scores lifted by what the mean of its rows' weights is more than the
weight of the mean (`score_bias`); and values are merged with keys, as rows of one score weigh the same. So half
of attention is not only not multiplied but not read, of V as of K. `block_policy` has the other
granularities.

HeadGroups: how much is grouped in each layer and KV head, and by what measure of likeness.

DeltaCalibration: what was found to keep delta close to dense attention on one model, as a file.

Knows no kernel; `calibrate` makes them.

How much the scores of what stands for several keys are lifted, in each layer and KV head.

A group that is seen as its mean m gets the weight exp(q m), and the mean of its keys' own weights is more
(Jensen). Were their scores normal, by a factor of exp of half their variance, which is the queries' mean
squares times the keys', channel by channel. They are not, least of all to a query that looks for one of the
keys; so each unit takes the share of that with which its own output was nearest to dense attention. Not in
the paper, as far as it is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lowtide.attention.bindings.structs import DeltaRule
from lowtide.attention.calibration import CalibrationMetrics, Fields, find_file, write_values
from lowtide.attention.policy import AttentionPolicy, PassController
from lowtide.memory.plan.estimates import PAGE_KEYS, KeyGroups
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.attention.bindings.policy import AttentionKernels


SHARES = (0.0, 0.06, 0.12, 0.2, 0.3, 0.45, 0.7, 1.0)

ScoreBias = tuple[tuple[float, ...], ...]
"""Of each layer and KV head."""


def fit_score_bias(
    squares: NDArray[np.float32], errors_with: Callable[[ScoreBias], NDArray[np.float32]]
) -> ScoreBias:
    """Return each unit's lift; `squares` (layers, kv_heads) are the mean squares of its queries' largest
    channel, and `errors_with` measures the units' errors, of that shape, with lifts."""
    import numpy as np

    offered = [_told(np.float32(share / 2) * squares) for share in SHARES]
    picked = np.stack([errors_with(score_bias) for score_bias in offered]).argmin(axis=0)
    return tuple(
        tuple(offered[choice][layer][head] for head, choice in enumerate(choices))
        for layer, choices in enumerate(picked)
    )


def _told(score_bias: NDArray[np.float32]) -> ScoreBias:
    """Rounded as a calibration's file has them."""
    return tuple(tuple(float(f"{lift:.4g}") for lift in layer) for layer in score_bias)


LEAST_GROUPS = 8
FULL_SCALE = 255
STEPS = 8 * PAGE_KEYS
"""In which what a unit keeps is shared out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGroups:
    """Of every layer and KV head, `num_groups` of a page of 64 keys (64: none is grouped), and `scales`,
    a byte a channel: how much it counts in the distance of two keys, against the unit's other channels.
    `score_bias` times the mean square of a group's distances from its mean is added to its scores (as if scores
    were not scaled): see `fit_score_bias`; 0 where queries are not known.
    """

    num_groups: tuple[tuple[int, ...], ...]
    score_bias: ScoreBias
    scales: tuple[tuple[bytes, ...], ...]

    @staticmethod
    def uniform(num_layers: int, num_kv_heads: int, head_dim: int, num_groups: int) -> HeadGroups:
        """Return units that are all grouped alike, with channels that all count alike."""
        return HeadGroups(
            num_groups=((num_groups,) * num_kv_heads,) * num_layers,
            score_bias=((0.0,) * num_kv_heads,) * num_layers,
            scales=((bytes([FULL_SCALE]) * head_dim,) * num_kv_heads,) * num_layers,
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
        """Return groups and lifts, (layers, kv_heads), and scales, (layers, kv_heads, head_dim)."""
        import numpy as np

        scales = np.array([[list(unit) for unit in layer] for layer in self.scales]) / FULL_SCALE
        return (
            np.array(self.num_groups, np.uint8),
            np.array(self.score_bias, np.float32),
            scales.astype(np.float32),
        )


def scale_bytes(squares: NDArray[np.float32]) -> tuple[tuple[bytes, ...], ...]:
    """Return scales from the mean squares of queries' channels, (layers, kv_heads, head_dim)."""
    import numpy as np

    query_rms = np.sqrt(squares)
    most = np.maximum(query_rms.max(axis=2, keepdims=True), 1e-30)
    found = np.maximum(np.round(query_rms / most * FULL_SCALE), 1).astype(np.uint8)
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
    num_kv_head_params = int(taking.sum())
    room = int(most * STEPS * num_kv_head_params + 1e-6)
    least, choices = np.zeros(room + 1), []
    for unit in range(num_kv_head_params):
        of_choices = np.full((len(costs), room + 1), np.inf)
        for choice, step in enumerate(steps[:, unit].tolist()):
            of_choices[choice, step:] = least[: max(room + 1 - step, 0)] + costs[choice, unit]
        choices.append(of_choices.argmin(axis=0))
        least = of_choices.min(axis=0)
    if not num_kv_head_params or not np.isfinite(least[room]):
        return None
    of_units = np.zeros(num_kv_head_params, np.intp)
    for unit in reversed(range(num_kv_head_params)):
        of_units[unit] = choices[unit][room]
        room -= int(steps[of_units[unit], unit])
    found = np.full(taking.shape, len(errors), np.intp)
    found[taking] = of_units
    return found


FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaCalibration(CalibrationMetrics):
    """Delta's units for one model, and how far from dense attention they measured."""

    units: HeadGroups

    def to_dict(self) -> dict[str, Any]:
        """Return the file's values; a layer's groups are a text, and so are its heads' scales, in hex."""
        measured = {
            field.name: getattr(self, field.name) for field in fields_of(CalibrationMetrics)
        }
        return {
            "format": FORMAT,
            "policy": "delta",
            **measured,
            "sparsity": round(self.units.sparsity, 4),
            "num_groups": [" ".join(map(str, layer)) for layer in self.units.num_groups],
            "score_bias": number_words(self.units.score_bias),
            "scales": [" ".join(unit.hex() for unit in layer) for layer in self.units.scales],
        }


def find_delta_calibration(spec: ModelSpec) -> DeltaCalibration | None:
    """Return the model's calibration, the user's before the shipped one; None where there is none."""
    path = find_file(f"{spec.fingerprint}.delta.json")
    return load_delta_calibration(path, spec) if path else None


def save_delta_calibration(calibration: DeltaCalibration, path: Path | None = None) -> Path:
    """Write the file, atomically, and return its path; None is the model's place in the cache."""
    return write_values(f"{calibration.fingerprint}.delta.json", calibration.to_dict(), path)


def load_delta_calibration(path: Path, spec: ModelSpec) -> DeltaCalibration:
    """Read and check a calibration of the model; raises `CalibrationError`."""
    fields = Fields(path, policy="delta", format=FORMAT)
    units = HeadGroups(
        num_groups=_groups(fields, spec),
        score_bias=numbers_of(fields, "score_bias", spec, 0.0),
        scales=scales_of(fields, spec),
    )
    found = DeltaCalibration(units=units, **fields.calibration_metrics())
    fields.check_model(spec)
    return found


def _groups(fields: Fields, spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    wanted = f"{LEAST_GROUPS} to {PAGE_KEYS} for each KV head of {spec.num_layers} layers"
    layers = layer_words(fields, "num_groups", spec, wanted)
    numbers = [tuple(int(word) for word in layer if word.isdecimal()) for layer in layers]
    if any(
        len(layer) != heads or not all(LEAST_GROUPS <= n <= PAGE_KEYS for n in layer)
        for layer, heads in zip(numbers, spec.num_kv_heads, strict=True)
    ):
        raise fields.wrong("num_groups", wanted)
    return tuple(numbers)


def scales_of(fields: Fields, spec: ModelSpec) -> tuple[tuple[bytes, ...], ...]:
    """Return each KV head's scales, a byte a channel."""
    wanted = f"{spec.key_head_dim} bytes in hex for each KV head of {spec.num_layers} layers"
    try:
        layers = [
            tuple(bytes.fromhex(word) for word in layer)
            for layer in layer_words(fields, "scales", spec, wanted)
        ]
    except ValueError:
        raise fields.wrong("scales", wanted) from None
    for layer, heads in zip(layers, spec.num_kv_heads, strict=True):
        if len(layer) != heads or any(len(unit) != spec.key_head_dim for unit in layer):
            raise fields.wrong("scales", wanted)
    return tuple(layers)


def number_words(numbers: tuple[tuple[float, ...], ...]) -> list[str]:
    """Return each layer's numbers as a text."""
    return [" ".join(f"{number:g}" for number in layer) for layer in numbers]


def numbers_of(
    fields: Fields, field: str, spec: ModelSpec, least: float
) -> tuple[tuple[float, ...], ...]:
    """Return each KV head's number."""
    wanted = f"numbers of {least:g} to 1e9 for each KV head of {spec.num_layers} layers"
    try:
        numbers = [tuple(map(float, words)) for words in layer_words(fields, field, spec, wanted)]
    except ValueError:
        raise fields.wrong(field, wanted) from None
    if any(
        len(layer) != heads or not all(least <= number <= 1e9 for number in layer)
        for layer, heads in zip(numbers, spec.num_kv_heads, strict=True)
    ):
        raise fields.wrong(field, wanted)
    return tuple(numbers)


def layer_words(fields: Fields, field: str, spec: ModelSpec, wanted: str) -> list[list[str]]:
    """Return the words of each layer's text."""
    layers = fields.value(field)
    if (
        not isinstance(layers, list)
        or len(layers) != spec.num_layers
        or not all(isinstance(layer, str) for layer in layers)
    ):
        raise fields.wrong(field, wanted)
    return [layer.split() for layer in layers]


DEFAULT_SPARSITY = 0.25
"""Without a calibration every layer and head is grouped alike, which loses much sooner."""
REFINE = 0.01
"""Of a head's weight: at a tenth of it a quarter more is read, and little gained."""
GROUPED, EXACT = "grouped", "exact"
MOST_WINDOW = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(AttentionPolicy):
    """Attention over groups of like keys; what is None comes from the model's calibration.

    Of each row's keys the last `window` and the first `sinks` of all are attended to as they are, and of
    the pages of 64 behind them a share, 1 - `sparsity`, as groups. A stated `sparsity` groups every layer
    and head alike. `prompts` "exact" has only decoding attend to groups. In decoding a group that gets more
    than the share `refine` of some head's weight is opened: its keys take its place; 0 opens none. With
    `store` 1 the groups are all that is kept of the keys and values behind the window, none can be opened:
    the cache's own memory goes back, and so the cache cannot, but for a few tokens: it is read anew.
    `calibration` is a file to take instead of the model's own; `units` are what a calibration consists of.
    """

    name: ClassVar[str] = "delta"

    sparsity: float | None = None
    window: int = 128
    sinks: int = 4
    prompts: str = GROUPED
    refine: float = REFINE
    store: int = 0
    calibration: Path | None = None
    units: HeadGroups | None = None
    origin: str = "stated"

    def __post_init__(self) -> None:
        check_span(self.window, self.sinks, self.prompts, self.refine)
        most = 1 - LEAST_GROUPS / PAGE_KEYS
        if self.sparsity is not None and not 0 <= self.sparsity <= most:
            raise BadOption(f"delta's sparsity is {self.sparsity:g}, 0 to {most:g} is wanted")
        if self.store not in (0, 1):
            raise BadOption(f"delta's store is {self.store}, 0 or 1 is wanted")
        if self.store and self.prompts == EXACT:
            raise BadOption(
                "delta's store keeps nothing but groups, and its prompts are exact, which read all keys: "
                "leave one out"
            )
        if self.sparsity is not None and self.calibration is not None:
            raise BadOption(
                "delta's sparsity and calibration are given, and a calibration has its own: leave one out"
            )

    def resolve(self, spec: ModelSpec) -> Delta:
        """Settle the units for the model; see the class."""
        check_kv_heads(spec)
        if self.units is not None:
            return self
        found: DeltaCalibration | None = None
        if self.calibration is not None:
            found = load_delta_calibration(self.calibration, spec)
        elif self.sparsity is None:
            found = find_delta_calibration(spec)
        if found is not None:
            return replace(self, units=found.units, origin=found.summary)
        if spec.sliding_window is not None:
            raise BadOption(
                f"{spec.name} has layers that see a sliding window, and which of them is not known: run "
                "lowtide calibrate --attention delta, or name a calibration"
            )
        sparsity = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        count = round((1 - sparsity) * PAGE_KEYS)
        units = HeadGroups.uniform(
            spec.num_layers, max(spec.num_kv_heads), spec.key_head_dim, count
        )
        origin = self.origin if self.sparsity is not None else "not calibrated for this model"
        return replace(self, units=units, origin=origin)

    @property
    def cache_key(self) -> str:
        """Every setting, wherever it came from."""
        return repr(replace(self, sparsity=None, calibration=None, origin=""))

    @property
    def key_groups(self) -> KeyGroups | None:
        """What is kept beside the cache, or in its place."""
        if self.units is None:
            return None
        layers = self.units.grouped_layers() if self.store else ()
        return KeyGroups(
            num_groups=self.units.grouped(),
            window=self.window,
            replaced_layers=layers,
            opened=self.refine > 0 and not self.store,
        )

    def install(self, hook: AttentionKernels, spec: ModelSpec) -> PassController:
        """Give the hook each unit's groups, lifts and scales."""
        assert self.units is not None, "the policy is not fitted to a model"
        hook.set_groups(
            DeltaRule(self.window, self.sinks, self.refine, self.store), *self.units.arrays()
        )
        return DeltaController(hook, self.prompts)

    def __str__(self) -> str:
        share = 0.0 if self.units is None else self.units.sparsity
        prompts = "" if self.prompts == GROUPED else f", prompts {self.prompts}"
        refine = "" if self.refine == REFINE else f", refine {self.refine:.2%}"
        store = ", stored in the cache's place" if self.store else ""
        return f"delta, sparsity {share:.0%}, window {self.window} ({self.origin}){prompts}{refine}{store}"


class DeltaController(PassController):
    """Every pass attends to groups, or those of decoding alone."""

    def __init__(self, hook: AttentionKernels, prompts: str) -> None:
        self._hook = hook
        self.exact_prefill = prompts == EXACT

    def begin_prefill(self) -> None:
        """Attend as prompts are to be read."""
        self._hook.start_pass(sparse=False)
        if not self.exact_prefill:
            self._start(refine=False)

    def begin_decode(self) -> None:
        """Attend to groups, and open some."""
        self._start(refine=True)

    def _start(self, *, refine: bool) -> None:
        if self._hook.has_lost_keys:
            raise LowtideError(
                "a pass has wanted keys that delta's store had replaced, and what it computed is wrong: "
                "start anew, or leave delta:store=1 out"
            )
        self._hook.start_grouped(refine=refine)


def check_span(window: int, sinks: int, prompts: str, refine: float) -> None:
    """Raise `BadOption` where these do not say which keys of which passes stay as they are."""
    if not 1 <= window <= MOST_WINDOW:
        raise BadOption(f"delta's window is {window}, 1 to {MOST_WINDOW:,} is wanted")
    if not 0 <= sinks < LEAST_GROUPS:
        raise BadOption(f"delta's sinks is {sinks}, 0 to {LEAST_GROUPS - 1} is wanted")
    if prompts not in (GROUPED, EXACT):
        raise BadOption(f"delta's prompts is {prompts!r}, one of {GROUPED}, {EXACT} is wanted")
    if not 0 <= refine <= 1:
        raise BadOption(f"delta's refine is {refine:g}, 0 (none) to 1 is wanted")


def check_kv_heads(spec: ModelSpec) -> None:
    """Raise `BadOption` where the model's heads are not as the kernels group them."""
    if len(set(spec.num_kv_heads)) != 1 or max(spec.num_kv_heads) == 0:
        counts = ", ".join(map(str, sorted(set(spec.num_kv_heads))))
        raise BadOption(
            f"delta groups the keys of as many KV heads in every layer, {spec.name} has {counts}: use "
            "--attention tidal or dense"
        )

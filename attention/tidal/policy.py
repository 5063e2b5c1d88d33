"""TidalDecode: a few layers choose the keys that the others attend to.

Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
arXiv 2410.05076, section 3. A reconstruction from the published code and figures, with two changes that
measured better here: keys are ranked by softmax weight summed over the heads instead of by raw score for
each head, and one set serves all heads. Prompts are attended to in full.

Calibration: what was found to keep TidalDecode close to dense attention on one model, as a file.

Knows no kernel; `calibrate` makes them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lowtide.attention.bindings.structs import SelectionRule
from lowtide.attention.calibration import (
    CalibrationError,
    CalibrationMetrics,
    Fields,
    find_file,
    is_count,
    write_values,
)
from lowtide.attention.dense import EXACT, check_kernels, check_prompts
from lowtide.attention.policy import AttentionPolicy, PassController
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.attention.bindings.policy import AttentionKernels


FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TidalCalibration(CalibrationMetrics):
    """TidalDecode's settings for one model, and how far from dense attention they measured."""

    k: int
    selection_layers: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the file's values."""
        return {"format": FORMAT, "policy": "tidal", **asdict(self)}


def find_tidal_calibration(spec: ModelSpec) -> TidalCalibration | None:
    """Return the model's calibration, the user's before the shipped one; None where there is none."""
    path = find_file(f"{spec.fingerprint}.json")
    return load_tidal_calibration(path, spec) if path else None


def save_tidal_calibration(calibration: TidalCalibration, path: Path | None = None) -> Path:
    """Write the file, atomically, and return its path; None is the model's place in the cache."""
    return write_values(f"{calibration.fingerprint}.json", calibration.to_dict(), path)


def load_tidal_calibration(path: Path, spec: ModelSpec) -> TidalCalibration:
    """Read and check a calibration of the model; raises `CalibrationError`."""
    fields = Fields(path, policy="tidal", format=FORMAT)
    found = TidalCalibration(
        k=fields.count("k"), selection_layers=_layers(fields), **fields.calibration_metrics()
    )
    fields.check_model(spec)
    outside = [layer for layer in found.selection_layers if not 0 <= layer < spec.num_layers]
    if outside:
        raise CalibrationError(
            f"the calibration {path}: selection_layers name layer {outside[0]}, {spec.name} has "
            f"{spec.num_layers} layers"
        )
    return found


def _layers(fields: Fields) -> tuple[int, ...]:
    layers = fields.value("selection_layers")
    if not isinstance(layers, list) or not layers or not all(map(is_count, layers)):
        raise fields.wrong("selection_layers", "a list of layer numbers")
    if layers != sorted(set(layers)):
        raise fields.wrong("selection_layers", "each layer once, in order,")
    return tuple(layers)


DEFAULT_K = 1024
DEFAULT_STEP = 6
"""Without a calibration every sixth layer from layer 2 on selects, while six follow it."""
ROLE_DENSE, ROLE_SELECT, ROLE_REUSE = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tidal(AttentionPolicy):
    """TidalDecode; what is None comes from the model's calibration, or from a default that is named.

    `k` is how many keys a sparse layer attends to: a number of tokens, or a fraction of the context
    below 1. `selection_layers` attend fully and choose, the layers before the first of them and the
    first `dense_layers` attend fully. Each row's first `sinks` and last `recent` tokens are always among
    the k. Keys are chosen anew every `refresh` tokens. Up to `min_context` tokens, and wherever k covers
    the context, attention is dense. Every `correction` decoded tokens (0: never) their keys and values
    are computed again by dense attention. `prompts` is as in `Dense`. `calibration` is a file
    to take instead of the model's own.
    """

    name: ClassVar[str] = "tidal"

    k: int | float | None = None
    selection_layers: tuple[int, ...] | None = None
    dense_layers: int = 2
    sinks: int = 4
    recent: int = 64
    refresh: int = 1
    min_context: int = 0
    correction: int = 0
    prompts: str = EXACT
    calibration: Path | None = None
    origin: str = "stated"

    def __post_init__(self) -> None:
        least = {"dense_layers": 0, "sinks": 0, "recent": 1, "refresh": 1}
        for field, lowest in {**least, "min_context": 0, "correction": 0}.items():
            if getattr(self, field) < lowest:
                raise BadOption(
                    f"tidal's {field} is {getattr(self, field)}, {lowest} or more is wanted"
                )
        if self.k is not None:
            _check_k(self.k, self.sinks + self.recent)
        if self.refresh > self.recent:
            raise BadOption(
                f"tidal's refresh is {self.refresh} and recent {self.recent}: the tokens since the last "
                "choice must be among the recent ones, so refresh may be at most recent"
            )

    def resolve(self, spec: ModelSpec) -> Tidal:
        """Settle k and the selection layers for the model; see the class."""
        check_prompts(self.prompts)
        found: TidalCalibration | None = None
        if self.calibration is not None:
            found = load_tidal_calibration(self.calibration, spec)
        elif self.selection_layers is None or self.k is None:
            found = find_tidal_calibration(spec)
        layers, k, origin = self.selection_layers, self.k, self.origin
        if layers is None:
            layers = found.selection_layers if found else default_selection_layers(spec)
            origin = found.summary if found else "default layers: not calibrated for this model"
        if k is None:
            k = found.k if found else DEFAULT_K
        _check_layers(layers, spec)
        return replace(self, k=k, selection_layers=layers, origin=origin)

    @property
    def cache_key(self) -> str:
        """Every setting, wherever it came from."""
        return repr(replace(self, calibration=None, origin=""))

    @property
    def num_selections(self) -> int:
        """How many layers choose keys."""
        return len(self.selection_layers or ())

    def roles(self, num_layers: int) -> bytes:
        """Return what each layer does in a sparse pass, one byte a layer."""
        layers = self.selection_layers or ()
        roles = [
            ROLE_DENSE
            if layer < self.dense_layers or not layers or layer < layers[0]
            else ROLE_REUSE
            for layer in range(num_layers)
        ]
        for layer in layers:
            roles[layer] = ROLE_SELECT
        return bytes(roles)

    @property
    def rule(self) -> SelectionRule:
        """How many keys a set has."""
        k = DEFAULT_K if self.k is None else self.k
        tokens, fraction = (int(k), 0.0) if k >= 1 else (0, float(k))
        return SelectionRule(tokens, fraction, self.sinks, self.recent, self.min_context)

    def install(self, hook: AttentionKernels, spec: ModelSpec) -> PassController:
        """Give the hook each layer's role."""
        assert self.selection_layers is not None, "the policy is not fitted to a model"
        check_kernels(hook, self.prompts)
        hook.set_roles(self.roles(spec.num_layers), self.rule)
        return TidalController(hook, self)

    def __str__(self) -> str:
        layers = "+".join(map(str, self.selection_layers or ()))
        k = f"{self.k:.0%}" if self.k is not None and self.k < 1 else self.k
        use_bf16 = "" if self.prompts == EXACT else f", prompts in {self.prompts}"
        return f"tidal, k {k}, selection layers {layers} ({self.origin}){use_bf16}"


class TidalController(PassController):
    """Prompts are dense, decoding is sparse and chooses anew every `refresh` tokens."""

    def __init__(self, hook: AttentionKernels, policy: Tidal) -> None:
        self._hook = hook
        self._refresh = policy.refresh
        self._num_decoded = 0
        self.correction_interval = policy.correction or None
        self.exact_prefill = policy.prompts == EXACT

    def begin_prefill(self) -> None:
        """Attend fully, and forget what was chosen."""
        self._num_decoded = 0
        self._hook.start_pass(sparse=False, use_bf16=not self.exact_prefill)

    def begin_decode(self) -> None:
        """Attend sparsely."""
        self._hook.start_pass(sparse=True, refresh=self._num_decoded % self._refresh == 0)
        self._num_decoded += 1


def default_selection_layers(spec: ModelSpec) -> tuple[int, ...]:
    """Return the layers that select where no calibration says so.

    In a model with sliding windows every layer: which of them see the whole context is not known, and
    so attention stays dense.
    """
    if spec.sliding_window is not None:
        return tuple(range(spec.num_layers))
    steps = range(2, spec.num_layers - DEFAULT_STEP, DEFAULT_STEP)
    return tuple(steps) or (min(2, spec.num_layers - 1),)


def _check_k(k: int | float, forced: int) -> None:
    if k <= 0:
        raise BadOption(
            f"tidal's k is {k}: a number of tokens above {forced}, or a fraction of the context, is wanted"
        )
    if k >= 1 and (k != int(k) or k <= forced):
        raise BadOption(
            f"tidal's k is {k}: {forced} tokens are always kept (sinks and recent), more than that and a "
            "whole number is wanted"
        )


def _check_layers(layers: tuple[int, ...], spec: ModelSpec) -> None:
    if not layers:
        raise BadOption("tidal's selection_layers are empty: at least one layer has to select")
    outside = next((layer for layer in layers if not 0 <= layer < spec.num_layers), None)
    if outside is not None:
        raise BadOption(
            f"tidal's selection_layers name layer {outside}; {spec.name} has layers 0 to "
            f"{spec.num_layers - 1}"
        )
    if list(layers) != sorted(set(layers)):
        raise BadOption(
            f"tidal's selection_layers are {'+'.join(map(str, layers))}: each once, in order, is wanted"
        )

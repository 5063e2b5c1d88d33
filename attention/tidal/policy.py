"""TidalDecode: a few layers select the keys that the other layers attend to.

Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
arXiv 2410.05076, section 3. A reconstruction from the published code and figures, with two changes that
measured better here: keys are ranked by softmax weight summed over the heads instead of by raw score in
each head, and all heads share one set. Prompts are read densely.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.bindings.structs import SelectionRule
from lowtide.attention.calibration import (
    Calibration,
    find_calibration,
    is_count,
    load_calibration,
)
from lowtide.attention.calibrator import Calibrator
from lowtide.attention.dense import EXACT, PROMPTS, PROMPTS_SETTING, check_kernels, check_prompts
from lowtide.attention.policy import (
    CALIBRATION,
    USER,
    AttentionPolicy,
    CalibratedPolicy,
    PassController,
    Setting,
    read_k,
)
from lowtide.attention.settings import (
    file_field,
    layers_field,
    number_of_keys,
    set_fields,
    whole_fields,
)
from lowtide.memory.plan.attention import AttentionMemory
from lowtide.memory.plan.estimates import padded_context
from lowtide.models.arguments.values import choice
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

DEFAULT_K = 1024
DEFAULT_STEP = 6
"""Without a calibration every sixth layer from layer 2 on selects, as long as six layers follow it."""
ROLE_DENSE, ROLE_SELECT, ROLE_REUSE = 0, 1, 2


def _read_layers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("+")))


@dataclass(frozen=True, slots=True, kw_only=True)
class TidalMemory(AttentionMemory):
    """Scores of up to 4 tokens of a pass, and a set of keys for each of `selection_layers` layers."""

    selection_layers: int

    def scratch_bytes(self, spec: ModelSpec, context: int, threads: int) -> int:
        """Return the bytes of scores and sets."""
        slots = padded_context(context)
        scores = 4 * spec.num_heads * 4 * (slots + 2)
        return scores + 4 * slots + self.selection_layers * 13 * slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Tidal(AttentionPolicy):
    """TidalDecode; settings that are None come from the model's calibration, or else from a default.

    `k` is how many keys a sparse layer attends to: a number of tokens, or below 1 a share of the context.
    `selection_layers` attend to all keys and select; the layers before the first of them and the first
    `dense_layers` are dense. A query's first `sinks` and last `recent` keys are always among the k. Keys
    are selected again every `refresh` tokens. Up to `min_context` tokens, and wherever k covers the
    context, attention is dense. Every `correction` decoded tokens (0: never) their keys and values are
    recomputed by dense attention (section 3.3, KV cache correction). `prompts` is as in `Dense`.
    `calibration` is a file to use instead of the model's own.
    """

    name: ClassVar[str] = "tidal"
    settings: ClassVar[tuple[Setting, ...]] = (
        Setting("k", read_k, "a number of tokens or a percentage"),
        Setting("layers", _read_layers, "layer numbers joined by +", field="selection_layers"),
        PROMPTS_SETTING,
        CALIBRATION,
    )
    can_follow_filter: ClassVar[bool] = True

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
    source: str = USER

    def __post_init__(self) -> None:
        least = {"dense_layers": 0, "sinks": 0, "recent": 1, "refresh": 1}
        set_fields(self, whole_fields(self, {**least, "min_context": 0, "correction": 0}))
        set_fields(
            self,
            {
                "k": number_of_keys("tidal's k", self.k),
                "selection_layers": layers_field("tidal's selection_layers", self.selection_layers),
                "calibration": file_field("tidal's calibration", self.calibration),
                "prompts": choice("tidal's prompts", self.prompts, PROMPTS),
            },
        )
        if self.k is not None:
            _check_k(self.k, self.sinks + self.recent)
        if self.refresh > self.recent:
            raise BadOption(
                f"tidal's refresh is {self.refresh} and recent is {self.recent}: refresh must be at most "
                "recent, so that the tokens since the last selection are among the recent ones"
            )

    @classmethod
    def calibrated(
        cls, spec: ModelSpec, prompt_tokens: int, num_tokens: int
    ) -> list[CalibratedPolicy]:
        """Return the calibrated k and layers; prompts are read exactly."""
        found = find_calibration(cls.name, spec)
        if found is None:
            return []
        policy, kl = cls().resolve(spec), found.metric("kl")
        read = policy._keys_read(spec, num_tokens)
        return [CalibratedPolicy(policy=policy, distance=found.distance, kl=kl, keys_read=read)]

    def _keys_read(self, spec: ModelSpec, num_tokens: int) -> float:
        """Return the share of the visible keys that a decoded token reads, over all layers."""
        visible, k = spec.visible_keys(num_tokens), self.k or DEFAULT_K
        most = int(k) if k >= 1 else round(k * num_tokens)
        roles = self.roles(spec.num_layers)
        read = [
            min(keys, most) if role == ROLE_REUSE else keys
            for keys, role in zip(visible, roles, strict=True)
        ]
        return sum(read) / max(sum(visible), 1)

    def resolve(self, spec: ModelSpec) -> Tidal:
        """Fill in k and the selection layers for the model."""
        check_prompts(self.prompts)
        found: Calibration | None = None
        if self.calibration is not None:
            found = load_calibration(self.calibration, self.name, spec)
        elif self.selection_layers is None or self.k is None:
            found = find_calibration(self.name, spec)
        layers, k, source = self.selection_layers, self.k, self.source
        if layers is None:
            layers = _calibrated_layers(found, spec) if found else default_selection_layers(spec)
            source = found.kl_summary if found else "default layers: not calibrated for this model"
        if k is None:
            k = found.count("k") if found else DEFAULT_K
        _check_layers(layers, spec)
        return replace(self, k=k, selection_layers=layers, source=source)

    @property
    def memory(self) -> TidalMemory:
        """Scores, and a set of keys for each selection layer."""
        return TidalMemory(selection_layers=len(self.selection_layers or ()))

    @property
    def cache_key(self) -> str:
        """All settings, whatever their source."""
        return repr(replace(self, calibration=None, source=""))

    @property
    def shares_selection(self) -> bool:
        """True: one selection serves all tokens of a pass."""
        return True

    def roles(self, num_layers: int) -> bytes:
        """Return each layer's role in a sparse pass, a byte a layer."""
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
        """How many keys are selected."""
        k = DEFAULT_K if self.k is None else self.k
        tokens, fraction = (int(k), 0.0) if k >= 1 else (0, float(k))
        return SelectionRule(tokens, fraction, self.sinks, self.recent, self.min_context)

    def configure(self, kernels: AttentionKernels, spec: ModelSpec) -> PassController:
        """Set each layer's role."""
        assert self.selection_layers is not None, "the policy is not resolved for a model"
        check_kernels(kernels, self.prompts)
        kernels.set_roles(self.roles(spec.num_layers), self.rule)
        return TidalController(kernels, self)

    @property
    def calibrator(self) -> Calibrator:
        """Finds the selection layers and k, or k alone for `selection_layers` that the user chose."""
        from lowtide.attention.tidal.calibrate import TidalCalibrator

        def policy(k: int, selection_layers: tuple[int, ...]) -> Tidal:
            return Tidal(k=k, selection_layers=selection_layers)

        has_others = self != Tidal(selection_layers=self.selection_layers)
        return TidalCalibrator(policy, self.selection_layers, has_other_settings=has_others)

    def describe(self) -> str:
        """Name k, the selection layers, and their source."""
        layers = "+".join(map(str, self.selection_layers or ()))
        k = f"{self.k:.0%}" if self.k is not None and self.k < 1 else self.k
        use_bf16 = "" if self.prompts == EXACT else f", prompts in {self.prompts}"
        return f"tidal, k {k}, selection layers {layers} ({self.source}){use_bf16}"


class TidalController(PassController):
    """Reads prompts densely; decodes sparsely and selects keys every `refresh` tokens."""

    def __init__(self, kernels: AttentionKernels, policy: Tidal) -> None:
        self._kernels = kernels
        self._refresh = policy.refresh
        self._num_decoded = 0
        self.correction_interval = policy.correction or None
        self.exact_prefill = policy.prompts == EXACT

    def begin_prefill(self) -> None:
        """Attend to every key; the next decoded token selects."""
        self._num_decoded = 0
        self._kernels.start_pass(sparse=False, use_bf16=not self.exact_prefill)

    def begin_decode(self) -> None:
        """Attend to the selected keys."""
        self._kernels.start_pass(sparse=True, refresh=self._num_decoded % self._refresh == 0)
        self._num_decoded += 1


def default_selection_layers(spec: ModelSpec) -> tuple[int, ...]:
    """Return the layers that select in a model without a calibration.

    In a model with sliding windows all layers select, and so attention stays dense: the header does not say
    which of them see the whole context.
    """
    if spec.sliding_window is not None:
        return tuple(range(spec.num_layers))
    steps = range(2, spec.num_layers - DEFAULT_STEP, DEFAULT_STEP)
    return tuple(steps) or (min(2, spec.num_layers - 1),)


def _calibrated_layers(found: Calibration, spec: ModelSpec) -> tuple[int, ...]:
    layers = found.params.get("selection_layers")
    if not isinstance(layers, list) or not layers or not all(map(is_count, layers)):
        raise found.param_error("selection_layers", "a list of layer numbers")
    if layers != sorted(set(layers)) or layers[-1] >= spec.num_layers:
        raise found.param_error(
            "selection_layers",
            f"layers of {spec.name}, 0 to {spec.num_layers - 1}, each once, in order",
        )
    return tuple(layers)


def _check_k(k: int | float, forced: int) -> None:
    if k <= 0:
        raise BadOption(
            f"tidal's k is {k}; it must be a number of tokens above {forced}, or a share of the context"
        )
    if k >= 1 and (k != int(k) or k <= forced):
        raise BadOption(
            f"tidal's k is {k}; it must be a whole number above {forced}, because the sinks and the recent "
            "tokens are always among the k"
        )


def _check_layers(layers: tuple[int, ...], spec: ModelSpec) -> None:
    if not layers:
        raise BadOption("tidal's selection_layers are empty: name at least one layer")
    outside = next((layer for layer in layers if not 0 <= layer < spec.num_layers), None)
    if outside is not None:
        raise BadOption(
            f"tidal's selection_layers include layer {outside}; {spec.name} has layers 0 to "
            f"{spec.num_layers - 1}"
        )
    if list(layers) != sorted(set(layers)):
        raise BadOption(
            f"tidal's selection_layers are {'+'.join(map(str, layers))}; each must be named once, in order"
        )

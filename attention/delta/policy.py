"""Delta: attention that merges similar keys behind a local window.

After Qi et al., "DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM
Inference", arXiv 2507.19608, which computes scores from what changed between keys, outside a local window.
The paper's construction rule is not published; this is a reconstruction, with changes that measured better.
Its three granularities are whole tokens (`groups`), blocks of channels, and single channels (`blocks`, the
paper's element form).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.calibration import Calibration, find_calibration, load_calibration
from lowtide.attention.calibrator import Calibrator
from lowtide.attention.delta.blocks import HeadThresholds
from lowtide.attention.delta.groups import LEAST_GROUPS, HeadGroups
from lowtide.attention.delta.head_params import PAGE_KEYS, HeadParams, Span, StartPass
from lowtide.attention.policy import (
    CALIBRATION,
    USER,
    AttentionPolicy,
    CalibratedPolicy,
    PassController,
    Setting,
    read_share,
)
from lowtide.attention.settings import Ranges, file_field, set_fields, whole_fields
from lowtide.memory.plan.attention import AttentionMemory
from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import choice, number, shown
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

TOKEN, BLOCK, ELEMENT = GRANULARITIES = ("token", "block", "element")
BLOCK_SIZES = (8, 16)
DEFAULT_SPARSITY = 0.25
"""Without a calibration all heads merge alike, which loses much sooner."""
DEFAULT_REFINE = {TOKEN: 0.01, BLOCK: 0.005, ELEMENT: 0.005}
"""Shares of a head's weight. Of tokens, a tenth of it reads a quarter more keys and gains little; blocks
approximate worse, and with much less every key is refined."""
MOST_SPARSITY = {TOKEN: 1 - LEAST_GROUPS / PAGE_KEYS, BLOCK: 0.95, ELEMENT: 0.95}
MOST_THRESHOLD = 1e6
MOST_WINDOW = 1 << 16
GROUPED, EXACT = "grouped", "exact"
_SHARE = "a share or a percentage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(AttentionPolicy):
    """Attention over merged keys; settings that are None come from the model's calibration.

    The last `window` keys of each query and the first `sinks` keys of the context stay exact; behind them,
    similar keys of a page of 64 are merged. `granularity` is "token" (whole keys, and their values), "block"
    (blocks of `block` channels, 8 or 16) or "element" (single channels). `sparsity` merges this share in
    every layer and head alike. `threshold`, for blocks and elements, is instead how far a block may be from
    the one it is merged into, as a multiple of 1 over the root mean square of the queries' channels.
    `prompts` "exact" reads prompts densely. In decoding, a merged key with more than the share `refine` of
    some head's attention weight is read exactly; 0 refines none. `calibration` is a file to use instead of
    the model's own; `params` are the parameters that a calibration consists of.
    """

    name: ClassVar[str] = "delta"
    settings: ClassVar[tuple[Setting, ...]] = (
        Setting("granularity", str),
        Setting("block"),
        Setting("sparsity", read_share, _SHARE),
        Setting("window"),
        Setting("refine", read_share, _SHARE),
        Setting("prompts", str),
        CALIBRATION,
    )

    granularity: str = TOKEN
    block: int | None = None
    sparsity: float | None = None
    threshold: float | None = None
    window: int = 128
    sinks: int = 4
    refine: float | None = None
    prompts: str = GROUPED
    calibration: Path | None = None
    params: HeadParams | None = None
    source: str = USER

    def __post_init__(self) -> None:
        choice("delta's granularity", self.granularity, GRANULARITIES)
        counts: Ranges = {"block": 0, "window": (1, MOST_WINDOW), "sinks": (0, LEAST_GROUPS - 1)}
        set_fields(self, whole_fields(self, counts))
        self._check_granularity()
        for name, least, most in (
            ("sparsity", 0, MOST_SPARSITY[self.granularity]),
            ("threshold", 0, MOST_THRESHOLD),
            ("refine", 0, 1),
        ):
            if (value := getattr(self, name)) is not None:
                set_fields(self, {name: number(f"delta's {name}", value, least, most)})
        choice("delta's prompts", self.prompts, (GROUPED, EXACT))
        set_fields(self, {"calibration": file_field("delta's calibration", self.calibration)})
        if not isinstance(self.params, HeadGroups | HeadThresholds | None):
            raise BadOption(
                f"delta's params is {shown(self.params)}; it must be what a calibration found, or None"
            )
        if self.sparsity is not None and self.threshold is not None:
            raise BadOption("delta's sparsity follows from its threshold: leave one of them out")
        if self.sparsity is not None and self.calibration is not None:
            raise BadOption("delta's calibration has its own sparsity: leave one of them out")

    def _check_granularity(self) -> None:
        if self.block is not None and self.granularity != BLOCK:
            raise BadOption(
                f"delta's block is {self.block} and its granularity is {self.granularity}: leave block "
                "out, or set granularity=block"
            )
        if self.block is not None and self.block not in BLOCK_SIZES:
            raise BadOption(f"delta's block is {self.block}; it must be 8 or 16 channels")
        if self.threshold is not None and self.granularity == TOKEN:
            raise BadOption(
                "delta's threshold is for granularity block and element: leave it out, or set one of them"
            )

    @property
    def channels(self) -> int | None:
        """The channels that are merged together; None for whole keys."""
        return {TOKEN: None, ELEMENT: 1}.get(self.granularity, self.block or BLOCK_SIZES[0])

    @property
    def key(self) -> str:
        """The policy key of the calibration file."""
        return f"{self.name}-{self.granularity}{self.channels if self.granularity == BLOCK else ''}"

    @classmethod
    def calibrated(
        cls, spec: ModelSpec, prompt_tokens: int, num_tokens: int
    ) -> list[CalibratedPolicy]:
        """Return each granularity that is calibrated; its keys behind the window are read as it was measured."""
        policies = [
            *(cls(granularity=name) for name in (TOKEN, ELEMENT)),
            *(cls(granularity=BLOCK, block=size) for size in BLOCK_SIZES),
        ]
        found = [(policy, find_calibration(policy.key, spec)) for policy in policies]
        return [
            CalibratedPolicy(
                policy=policy.resolve(spec),
                distance=calibration.distance,
                kl=calibration.metric("kl"),
                keys_read=calibration.metric("keys_read") if num_tokens > policy.window else 1.0,
            )
            for policy, calibration in found
            if calibration is not None
        ]

    def resolve(self, spec: ModelSpec) -> Delta:
        """Fill in the parameters for the model."""
        if len(set(spec.num_kv_heads)) != 1 or max(spec.num_kv_heads) == 0:
            counts = ", ".join(map(str, sorted(set(spec.num_kv_heads))))
            raise BadOption(
                f"delta needs the same number of KV heads in every layer, and {spec.name} has {counts}: "
                f"use {option('attention', 'tidal')} or dense"
            )
        refine = DEFAULT_REFINE[self.granularity] if self.refine is None else self.refine
        if self.params is not None:
            return replace(self, refine=refine)
        found: Calibration | None = None
        if self.calibration is not None:
            found = load_calibration(self.calibration, self.key, spec)
        elif self.sparsity is None:
            found = find_calibration(self.key, spec)
        params, source = self._calibrated(found, spec) if found else self._uniform(spec)
        return replace(self, refine=refine, params=params, source=source)

    def _calibrated(self, found: Calibration, spec: ModelSpec) -> tuple[HeadParams, str]:
        if self.channels is None:
            return HeadGroups.of(found, spec), found.kl_summary
        params = HeadThresholds.of(found, spec, self.channels)
        if self.threshold is not None:
            return params.all_at(self.threshold), self.source
        return params, found.kl_summary

    def _uniform(self, spec: ModelSpec) -> tuple[HeadParams, str]:
        """Return the same parameters for all layers that see the whole context, and where they come from.

        Where it is not known which do, the kernels leave a layer dense as soon as its window hides a key.
        """
        is_set = self.sparsity is not None or self.threshold is not None
        sparsity = self.sparsity if is_set else DEFAULT_SPARSITY
        share = 1.0 if sparsity is None else 1 - sparsity
        source = self.source if is_set else "not calibrated for this model"
        dense = set(range(spec.num_layers)) - set(spec.full_layers or range(spec.num_layers))
        source += f"; {len(dense)} layers with a sliding window stay dense" if dense else ""
        shape = (spec.num_layers, max(spec.num_kv_heads), spec.key_head_dim)
        if self.channels is None:
            groups = HeadGroups.uniform(*shape, round(share * PAGE_KEYS))
            return groups.without(dense), source
        threshold = self.threshold or 0.0
        thresholds = HeadThresholds.uniform(
            *shape, block=self.channels, threshold=threshold, share=share
        )
        return thresholds.without(dense), source

    @property
    def usage(self) -> str:
        """The policy and its granularity as they are typed."""
        if self.granularity == TOKEN:
            return self.name
        size = f",block={self.channels}" if self.granularity == BLOCK else ""
        return f"{self.name}:granularity={self.granularity}{size}"

    @property
    def cache_key(self) -> str:
        """All settings, whatever their source."""
        return repr(replace(self, threshold=None, sparsity=None, calibration=None, source=""))

    @property
    def memory(self) -> AttentionMemory:
        """The memory of the merged keys, beside the KV cache."""
        params, span = self._resolved
        return params.memory(span)

    def configure(self, kernels: AttentionKernels, spec: ModelSpec) -> PassController:
        """Set the parameters of every layer and head."""
        params, span = self._resolved
        start = params.configure(kernels, span)
        return DeltaController(kernels, start, exact_prefill=self.prompts == EXACT)

    @property
    def _resolved(self) -> tuple[HeadParams, Span]:
        assert self.params is not None and self.refine is not None, "the policy is not resolved"
        return self.params, Span(self.window, self.sinks, self.refine)

    @property
    def calibrator(self) -> Calibrator:
        """Finds the parameters of every layer and head."""
        from lowtide.attention.delta.calibrate import DeltaCalibrator

        def policy(params: HeadParams) -> Delta:
            return replace(self, params=params)

        fixed = next(
            (n for n in ("calibration", "sparsity", "threshold") if getattr(self, n) is not None),
            None,
        )
        return DeltaCalibrator(policy, self.key, self.usage, self.channels, fixed_setting=fixed)

    def describe(self) -> str:
        """Name the granularity, the sparsity, the window and their source."""
        merged = {None: "", 1: "elements, "}.get(self.channels, f"blocks of {self.channels}, ")
        found = "" if self.params is None else f"{self.params.describe()}, "
        prompts = "" if self.prompts == GROUPED else f", prompts {self.prompts}"
        is_default = self.refine in (None, DEFAULT_REFINE[self.granularity])
        refine = "" if is_default else f", refine {self.refine:.2%}"
        window = f"window {self.window}"
        return f"delta, {merged}{found}{window} ({self.source}){prompts}{refine}"


class DeltaController(PassController):
    """Attends to merged keys in every pass, or in decoding alone if prompts are exact."""

    def __init__(self, kernels: AttentionKernels, start: StartPass, *, exact_prefill: bool) -> None:
        self._kernels = kernels
        self._start = start
        self.exact_prefill = exact_prefill

    def begin_prefill(self) -> None:
        """Attend as prompts are read."""
        self._kernels.start_pass(sparse=False)
        if not self.exact_prefill:
            self._start(refine=False)

    def begin_decode(self) -> None:
        """Attend to merged keys, and refine some."""
        self._kernels.start_pass(sparse=False)
        self._start(refine=True)

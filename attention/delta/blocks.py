"""DeltaLLM's attention by blocks of channels, or single ones: what a key repeats is not multiplied again.

Qi et al., "DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM
Inference", arXiv 2507.19608. Its construction rule is not published: ours is a reconstruction, with a
change that measured much better. Behind a window a key's block of channels is not compared with the last
that was sent but joins the likest that its page of 64 has sent, wherever that stands: what joined shares
its product, and is seen as the mean. Values are seen as they are: at the most half of attention is saved.

HeadThresholds: which blocks of channels are sent in each layer and KV head.

DeltaBlocksCalibration: what keeps delta by blocks close to dense attention on one model, as a file.

Knows no kernel; `calibrate` makes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lowtide.attention.bindings.structs import StatesRule
from lowtide.attention.calibration import CalibrationMetrics, Fields, find_file, write_values
from lowtide.attention.delta.tokens import (
    EXACT,
    FULL_SCALE,
    GROUPED,
    check_kv_heads,
    check_span,
    number_words,
    numbers_of,
    scale_bytes,
    scales_of,
)
from lowtide.attention.policy import AttentionPolicy, PassController
from lowtide.memory.plan.attention import KeyStates
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.attention.bindings.policy import AttentionKernels


LEFT_DENSE = -1.0
"""The threshold of a layer that keeps its attention dense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadThresholds:
    """Of every layer and KV head a threshold, and the root mean squares of its queries' channels.

    A block of `block` channels is sent where it is further than `thresholds` from all that its page has
    sent, as multiples of 1 over the channels' roots: `query_rms` is the largest, `scales` a byte a channel, how
    large the channel's is against that. Below a `share` of 1 each page of 64 keys has a threshold of its
    own instead, with which it sends no more than that share of its blocks. `sparsity` is the share that
    was not sent where thresholds were found; None where that is not known.
    """

    block: int
    thresholds: tuple[tuple[float, ...], ...]
    query_rms: tuple[tuple[float, ...], ...]
    scales: tuple[tuple[bytes, ...], ...]
    share: float = 1.0
    sparsity: float | None = None

    @staticmethod
    def uniform(
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block: int,
        threshold: float = 0.0,
        share: float = 1.0,
    ) -> HeadThresholds:
        """Return units that are all alike, with channels that all count alike, of queries of 1."""
        return HeadThresholds(
            block=block,
            thresholds=((threshold,) * num_kv_heads,) * num_layers,
            query_rms=((1.0,) * num_kv_heads,) * num_layers,
            scales=((bytes([FULL_SCALE]) * head_dim,) * num_kv_heads,) * num_layers,
            share=share,
        )

    @staticmethod
    def of_squares(
        squares: NDArray[np.float32], *, block: int, thresholds: NDArray[np.float32]
    ) -> HeadThresholds:
        """Return units of queries' mean squares by channel, (layers, kv_heads, head_dim)."""
        import numpy as np

        query_rms = np.sqrt(squares.max(axis=2))
        return HeadThresholds(
            block=block,
            thresholds=tuple(tuple(map(float, layer)) for layer in thresholds),
            query_rms=tuple(tuple(float(f"{root:.4g}") for root in layer) for layer in query_rms),
            scales=scale_bytes(squares),
        )

    def all_at(self, threshold: float) -> HeadThresholds:
        """Return the same with one threshold, but for layers that are dense."""
        thresholds = tuple(
            tuple(LEFT_DENSE if of_unit < 0 else threshold for of_unit in layer)
            for layer in self.thresholds
        )
        return replace(self, thresholds=thresholds, sparsity=None)

    @property
    def num_taken(self) -> int:
        """How many layers and KV heads keep states."""
        return sum(len(layer) for layer in self.thresholds if min(layer) >= 0)

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return thresholds and shares, (layers, kv_heads), and roots, (layers, kv_heads, head_dim)."""
        import numpy as np

        thresholds = np.array(self.thresholds, np.float32)
        scales = np.array([[list(unit) for unit in layer] for layer in self.scales]) / FULL_SCALE
        query_rms = (scales * np.array(self.query_rms)[:, :, None]).astype(np.float32)
        return thresholds, np.full_like(thresholds, self.share), query_rms

    def __str__(self) -> str:
        if self.share < 1:
            return f"sparsity {1 - self.share:.0%}"
        if self.sparsity is not None:
            return f"sparsity {self.sparsity:.0%}"
        stated = max(map(max, self.thresholds), default=0.0)
        return f"threshold {stated:g}"


FORMAT = 2
"""1 had thresholds for keys that were compared with the last one sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaBlocksCalibration(CalibrationMetrics):
    """Delta's units by blocks for one model, and how far from dense attention they measured."""

    units: HeadThresholds

    def to_dict(self) -> dict[str, Any]:
        """Return the file's values; a layer's numbers are a text, and so are its heads' scales, in hex."""
        measured = {
            field.name: getattr(self, field.name) for field in fields_of(CalibrationMetrics)
        }
        units = self.units
        return {
            "format": FORMAT,
            "policy": policy_name(units.block),
            **measured,
            "sparsity": round(units.sparsity or 0.0, 4),
            "thresholds": number_words(units.thresholds),
            "query_rms": number_words(units.query_rms),
            "scales": [" ".join(unit.hex() for unit in layer) for layer in units.scales],
        }


def policy_name(block: int) -> str:
    """Return what such a file says that it is of."""
    return f"delta-block{block}" if block > 1 else "delta-element"


def find_blocks_calibration(spec: ModelSpec, block: int) -> DeltaBlocksCalibration | None:
    """Return the model's calibration, the user's before the shipped one; None where there is none."""
    path = find_file(f"{spec.fingerprint}.{policy_name(block)}.json")
    return load_blocks_calibration(path, spec, block) if path else None


def save_blocks_calibration(calibration: DeltaBlocksCalibration, path: Path | None = None) -> Path:
    """Write the file, atomically, and return its path; None is the model's place in the cache."""
    name = f"{calibration.fingerprint}.{policy_name(calibration.units.block)}.json"
    return write_values(name, calibration.to_dict(), path)


def load_blocks_calibration(path: Path, spec: ModelSpec, block: int) -> DeltaBlocksCalibration:
    """Read and check a calibration of the model, for blocks of that size; raises `CalibrationError`."""
    fields = Fields(path, policy=policy_name(block), format=FORMAT)
    units = HeadThresholds(
        block=block,
        thresholds=numbers_of(fields, "thresholds", spec, LEFT_DENSE),
        query_rms=numbers_of(fields, "query_rms", spec, 0.0),
        scales=scales_of(fields, spec),
        sparsity=fields.number("sparsity"),
    )
    found = DeltaBlocksCalibration(units=units, **fields.calibration_metrics())
    fields.check_model(spec)
    return found


BLOCK, ELEMENT = "block", "element"
BLOCK_SIZES = (8, 16)
REFINE = 0.005
"""Less than of groups, as states are further off; much less opens all that a head sees alike."""
DEFAULT_SPARSITY = 0.25
"""Without a calibration every layer and head sends alike, which loses much sooner."""
MOST_SPARSITY = 0.95
MOST_THRESHOLD = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaBlocks(AttentionPolicy):
    """Attention over states of keys; what is None comes from the model's calibration.

    Of each row's keys the last `window` are seen as they are, and whole pages of 64 behind them as states;
    the first `sinks` of all are sent whole. `granularity` "block" sends `block` channels together, 8 or 16;
    "element" single ones. A stated `threshold` is how far they may be from what they join, everywhere, as a
    multiple of 1 over the root mean square of the query's channels, as the calibration has it, 1 without
    one; a stated `sparsity` has every page of every head send no more than the rest. `prompts` "exact" has
    only decoding see states. In decoding a state that gets more than the share `refine` of some head's
    weight is opened: its key takes its place; 0 opens none. `calibration` is a file to take instead of the
    model's own; `units` are what a calibration consists of.
    """

    name: ClassVar[str] = "delta"

    granularity: str = BLOCK
    block: int | None = None
    threshold: float | None = None
    sparsity: float | None = None
    window: int = 128
    sinks: int = 4
    prompts: str = GROUPED
    refine: float = REFINE
    calibration: Path | None = None
    units: HeadThresholds | None = None
    origin: str = "stated"

    def __post_init__(self) -> None:
        if self.granularity not in (BLOCK, ELEMENT):
            raise BadOption(
                f"delta's granularity is {self.granularity!r}, one of row, {BLOCK}, {ELEMENT} is wanted"
            )
        if self.granularity == ELEMENT and self.block is not None:
            raise BadOption(
                f"delta's block is {self.block} and its granularity element, which is one channel: leave "
                "one out"
            )
        if self.block is not None and self.block not in BLOCK_SIZES:
            raise BadOption(f"delta's block is {self.block}, 8 or 16 channels are wanted")
        check_span(self.window, self.sinks, self.prompts, self.refine)
        self._check_stated()

    def _check_stated(self) -> None:
        threshold, sparsity = self.threshold, self.sparsity
        if threshold is not None and not 0 <= threshold <= MOST_THRESHOLD:
            raise BadOption(
                f"delta's threshold is {threshold:g}, 0 to {MOST_THRESHOLD:,.0f} is wanted"
            )
        if sparsity is not None and not 0 <= sparsity <= MOST_SPARSITY:
            raise BadOption(f"delta's sparsity is {sparsity:g}, 0 to {MOST_SPARSITY:g} is wanted")
        if threshold is not None and sparsity is not None:
            raise BadOption(
                "delta's threshold and sparsity are given, and each follows from the other: leave one out"
            )
        if sparsity is not None and self.calibration is not None:
            raise BadOption(
                "delta's sparsity and calibration are given, and a calibration has its own: leave one out"
            )

    @property
    def channels(self) -> int:
        """How many channels are sent together."""
        return 1 if self.granularity == ELEMENT else self.block or BLOCK_SIZES[0]

    def resolve(self, spec: ModelSpec) -> DeltaBlocks:
        """Settle the units for the model; see the class."""
        check_kv_heads(spec)
        if self.units is not None:
            return self
        found: DeltaBlocksCalibration | None = None
        if self.calibration is not None:
            found = load_blocks_calibration(self.calibration, spec, self.channels)
        elif self.sparsity is None:
            found = find_blocks_calibration(spec, self.channels)
        if found is not None and self.threshold is None:
            return replace(self, units=found.units, origin=found.summary)
        if found is not None and self.threshold is not None:
            return replace(self, units=found.units.all_at(self.threshold))
        if spec.sliding_window is not None:
            raise BadOption(
                f"{spec.name} has layers that see a sliding window, and which of them is not known: run "
                f"lowtide calibrate --attention {self.told}, or name a calibration"
            )
        is_stated = self.threshold is not None or self.sparsity is not None
        sparsity = self.sparsity if is_stated else DEFAULT_SPARSITY
        units = HeadThresholds.uniform(
            spec.num_layers,
            max(spec.num_kv_heads),
            spec.key_head_dim,
            block=self.channels,
            threshold=self.threshold or 0.0,
            share=1.0 if sparsity is None else 1 - sparsity,
        )
        origin = self.origin if is_stated else "not calibrated for this model"
        return replace(self, units=units, origin=origin)

    @property
    def told(self) -> str:
        """The granularity as it is typed."""
        size = f",block={self.channels}" if self.granularity == BLOCK else ""
        return f"delta:granularity={self.granularity}{size}"

    @property
    def cache_key(self) -> str:
        """Every setting, wherever it came from."""
        settled = replace(self, threshold=None, sparsity=None, calibration=None, origin="")
        return repr(settled)

    @property
    def key_states(self) -> KeyStates | None:
        """What is kept beside the cache."""
        if self.units is None:
            return None
        return KeyStates(
            num_kv_head_params=self.units.num_taken, block=self.units.block, opened=self.refine > 0
        )

    def install(self, hook: AttentionKernels, spec: ModelSpec) -> PassController:
        """Give the hook each unit's threshold and scales."""
        assert self.units is not None, "the policy is not fitted to a model"
        rule = StatesRule(self.window, self.sinks, self.units.block, self.refine)
        hook.states.set_head_params(rule, *self.units.arrays())
        return DeltaBlocksController(hook, self.prompts)

    def __str__(self) -> str:
        of = "elements" if self.channels == 1 else f"blocks of {self.channels}"
        found = "" if self.units is None else f", {self.units}"
        prompts = "" if self.prompts == GROUPED else f", prompts {self.prompts}"
        refine = "" if self.refine == REFINE else f", refine {self.refine:.2%}"
        return f"delta, {of}{found}, window {self.window} ({self.origin}){prompts}{refine}"


class DeltaBlocksController(PassController):
    """Every pass sees states, or those of decoding alone."""

    def __init__(self, hook: AttentionKernels, prompts: str) -> None:
        self._hook = hook
        self.exact_prefill = prompts == EXACT

    def begin_prefill(self) -> None:
        """Attend as prompts are to be read."""
        self._hook.start_pass(sparse=False)
        if not self.exact_prefill:
            self._hook.states.start()

    def begin_decode(self) -> None:
        """Attend to states, and to some keys themselves."""
        self._hook.start_pass(sparse=False)
        self._hook.states.start(refine=True)

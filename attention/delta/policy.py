"""DeltaLLM's attention in our form: keys behind a window that are alike share one score and one value.

Qi et al., "DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM
Inference", arXiv 2507.19608, computes scores from what changed between keys, outside a local window. Its
construction rule is not published. Ours reuses whole rows, with changes that measured better: a row is not
compared with the last one that was sent but joins the likest rows of its page of 64, by key and value; what
stands for a group is its mean, in the scores lifted by what the mean of its rows' weights is more than the
weight of the mean (`lifts`); and values are merged with keys, as rows of one score weigh the same. So half
of attention is not only not multiplied but not read, of V as of K. `block_policy` has the other
granularities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lowtide.attention.delta.calibration import (
    DeltaCalibration,
    find_delta_calibration,
    load_delta_calibration,
)
from lowtide.attention.delta.kernels import DeltaRule
from lowtide.attention.delta.units import LEAST_GROUPS, DeltaUnits
from lowtide.attention.policy import AttentionPolicy, Steering
from lowtide.memory.key_groups import PAGE_KEYS, KeyGroups
from lowtide.models.errors import BadOption, LowtideError
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    from lowtide.attention.kernel_host import KernelHost

DEFAULT_SPARSITY = 0.25
"""Without a calibration every layer and head is grouped alike, which loses much sooner."""
OPENS = 0.01
"""Of a head's weight: at a tenth of it a quarter more is read, and little gained."""
GROUPED, EXACT = "grouped", "exact"
MOST_WINDOW = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(AttentionPolicy):
    """Attention over groups of like keys; what is None comes from the model's calibration.

    Of each row's keys the last `window` and the first `sinks` of all are attended to as they are, and of
    the pages of 64 behind them a share, 1 - `sparsity`, as groups. A stated `sparsity` groups every layer
    and head alike. `prompts` "exact" has only decoding attend to groups. In decoding a group that gets more
    than the share `opens` of some head's weight is opened: its keys take its place; 0 opens none. With
    `store` 1 the groups are all that is kept of the keys and values behind the window, none can be opened:
    the cache's own memory goes back, and so the cache cannot, but for a few tokens: it is read anew.
    `calibration` is a file to take instead of the model's own; `units` are what a calibration consists of.
    """

    name: ClassVar[str] = "delta"

    sparsity: float | None = None
    window: int = 128
    sinks: int = 4
    prompts: str = GROUPED
    opens: float = OPENS
    store: int = 0
    calibration: Path | None = None
    units: DeltaUnits | None = None
    origin: str = "stated"

    def __post_init__(self) -> None:
        check_span(self.window, self.sinks, self.prompts, self.opens)
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

    def fitted(self, spec: ModelSpec) -> Delta:
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
        units = DeltaUnits.uniform(
            spec.num_layers, max(spec.num_kv_heads), spec.key_head_size, count
        )
        origin = self.origin if self.sparsity is not None else "not calibrated for this model"
        return replace(self, units=units, origin=origin)

    @property
    def identity(self) -> str:
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
            opened=self.opens > 0 and not self.store,
        )

    def install(self, hook: KernelHost, spec: ModelSpec) -> Steering:
        """Give the hook each unit's groups, lifts and scales."""
        assert self.units is not None, "the policy is not fitted to a model"
        hook.set_groups(
            DeltaRule(self.window, self.sinks, self.opens, self.store), *self.units.arrays()
        )
        return DeltaSteering(hook, self.prompts)

    def __str__(self) -> str:
        share = 0.0 if self.units is None else self.units.sparsity
        prompts = "" if self.prompts == GROUPED else f", prompts {self.prompts}"
        opens = "" if self.opens == OPENS else f", opens {self.opens:.2%}"
        store = ", stored in the cache's place" if self.store else ""
        return f"delta, sparsity {share:.0%}, window {self.window} ({self.origin}){prompts}{opens}{store}"


class DeltaSteering(Steering):
    """Every pass attends to groups, or those of decoding alone."""

    def __init__(self, hook: KernelHost, prompts: str) -> None:
        self._hook = hook
        self.exact_prompts = prompts == EXACT

    def before_prompt(self) -> None:
        """Attend as prompts are to be read."""
        self._hook.start_pass(sparse=False)
        if not self.exact_prompts:
            self._start(opens=False)

    def before_decode(self) -> None:
        """Attend to groups, and open some."""
        self._start(opens=True)

    def _start(self, *, opens: bool) -> None:
        if self._hook.has_lost_keys:
            raise LowtideError(
                "a pass has wanted keys that delta's store had replaced, and what it computed is wrong: "
                "start anew, or leave delta:store=1 out"
            )
        self._hook.start_grouped(opens=opens)


def check_span(window: int, sinks: int, prompts: str, opens: float) -> None:
    """Raise `BadOption` where these do not say which keys of which passes stay as they are."""
    if not 1 <= window <= MOST_WINDOW:
        raise BadOption(f"delta's window is {window}, 1 to {MOST_WINDOW:,} is wanted")
    if not 0 <= sinks < LEAST_GROUPS:
        raise BadOption(f"delta's sinks is {sinks}, 0 to {LEAST_GROUPS - 1} is wanted")
    if prompts not in (GROUPED, EXACT):
        raise BadOption(f"delta's prompts is {prompts!r}, one of {GROUPED}, {EXACT} is wanted")
    if not 0 <= opens <= 1:
        raise BadOption(f"delta's opens is {opens:g}, 0 (none) to 1 is wanted")


def check_kv_heads(spec: ModelSpec) -> None:
    """Raise `BadOption` where the model's heads are not as the kernels group them."""
    if len(set(spec.num_kv_heads)) != 1 or max(spec.num_kv_heads) == 0:
        counts = ", ".join(map(str, sorted(set(spec.num_kv_heads))))
        raise BadOption(
            f"delta groups the keys of as many KV heads in every layer, {spec.name} has {counts}: use "
            "--attention tidal or dense"
        )

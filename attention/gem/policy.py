"""GemFilter: only the tokens that a prompt's end attends to in an early layer are read by every layer.

After arXiv 2409.17422 (Algorithm 1). The paper scores keys by the last row's raw products, summed over
heads and averaged over 5 neighbours; by that rule the models that this was measured on lose most pass
keys. Our default differs: what a key weighs in each head's softmax, the largest over heads and the last 16
rows, spread to 16 neighbours on either side, with the first and the last tokens always kept. The paper's
rule is `rows=1,weights=raw,heads=sum,pool=mean,pool_size=5,first=0,last=0`.

GemCalibration: the layer that was found to keep what questions ask for in one model, as a file.

Knows no kernel; `gem_calibrate` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lowtide.attention.bindings.structs import ScoreRule
from lowtide.attention.calibration import Fields, find_file, write_values
from lowtide.attention.delta.blocks import DeltaBlocks
from lowtide.attention.delta.tokens import Delta
from lowtide.attention.dense import Dense
from lowtide.attention.policy import AttentionPolicy, PassController
from lowtide.attention.tidal.policy import Tidal
from lowtide.memory.plan.attention import FilterPrefill, retained_tokens
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowtide.attention.bindings.policy import AttentionKernels


FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GemCalibration:
    """GemFilter's settings for one model, and what they measured.

    `rows` to `last` are the rule, as in `Gem`: for another one the layer says nothing. On questions and
    text that the search did not see, in prompts of up to `context` tokens: of `num_asked` the sentences of
    `num_kept` were kept whole; of the `num_dense_answered` that the whole prompt answers, what was kept
    answers `num_answered`. The share `margin` of k could go, and every sentence be kept still; below 0 one
    was not.
    """

    fingerprint: str
    model: str
    layer: int
    k: int
    rows: int
    weights: str
    heads: str
    pool: str
    pool_size: int
    first: int
    last: int
    num_asked: int
    num_kept: int
    num_dense_answered: int
    num_answered: int
    margin: float
    context: int
    text: str

    @property
    def summary(self) -> str:
        """Say in a few words where the settings come from."""
        return (
            f"calibrated: {self.num_answered} of {self.num_dense_answered} answers kept at "
            f"{self.context:,} tokens"
        )

    def has_rule(self, rule: Mapping[str, Any]) -> bool:
        """Whether it was made for the rule of these settings."""
        return all(getattr(self, name) == value for name, value in rule.items())

    def to_dict(self) -> dict[str, Any]:
        """Return the file's values."""
        return {"format": FORMAT, "policy": "gem", **asdict(self)}


def find_gem_calibration(spec: ModelSpec) -> GemCalibration | None:
    """Return the model's calibration, the user's before the shipped one; None where there is none."""
    path = find_file(_name(spec.fingerprint))
    return load_gem_calibration(path, spec) if path else None


def save_gem_calibration(calibration: GemCalibration, path: Path | None = None) -> Path:
    """Write the file, atomically, and return its path; None is the model's place in the cache."""
    return write_values(_name(calibration.fingerprint), calibration.to_dict(), path)


def load_gem_calibration(path: Path, spec: ModelSpec) -> GemCalibration:
    """Read and check a calibration of the model; raises `CalibrationError`."""
    fields = Fields(path, policy="gem", format=FORMAT)
    found = GemCalibration(
        fingerprint=fields.text("fingerprint"),
        model=fields.text("model"),
        layer=fields.count("layer", least=0),
        k=fields.count("k"),
        rows=fields.count("rows"),
        weights=fields.text("weights"),
        heads=fields.text("heads"),
        pool=fields.text("pool"),
        pool_size=fields.count("pool_size"),
        first=fields.count("first", least=0),
        last=fields.count("last", least=0),
        num_asked=fields.count("num_asked"),
        num_kept=fields.count("num_kept", least=0),
        num_dense_answered=fields.count("num_dense_answered"),
        num_answered=fields.count("num_answered", least=0),
        margin=fields.number("margin", least=-1e9),
        context=fields.count("context"),
        text=fields.text("text"),
    )
    fields.check_model(spec)
    if found.layer >= spec.num_layers:
        raise fields.wrong("layer", f"one of {spec.name}'s layers, 0 to {spec.num_layers - 1},")
    return found


def _name(fingerprint: str) -> str:
    return f"{fingerprint}.gem.json"


DEFAULT_K = 512
DEFAULT_MIN_PROMPT = 1024
MAX_ROWS = 32
"""Rows that are scored lie in one pass, and every plan has passes of so many."""
SETTINGS = {"weights": ("softmax", "raw"), "heads": ("max", "sum"), "pool": ("max", "mean")}
RULE = ("rows", "weights", "heads", "pool", "pool_size", "first", "last")
"""The settings that a calibrated layer was found with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gem(AttentionPolicy):
    """Keep `k` tokens (a share of the prompt, where below 1) of prompts of more than `min_prompt`.

    `layer` is the one that chooses, counted from 0. Both come from the model's calibration where they are
    None, or are 512 and a quarter of the way up; `calibration` is a file to take instead. `rows`,
    `weights`, `heads`, `pool` and `pool_size` are the rule, `first` and `last` tokens are always among the
    kept; `then` attends to what was kept. For questions on a text: a text that is to be continued loses
    what it does not look back at, so `continues` must be set for plain completion.
    """

    name: ClassVar[str] = "gem"

    k: int | float | None = None
    layer: int | None = None
    then: AttentionPolicy = field(default_factory=Dense)
    min_prompt: int = DEFAULT_MIN_PROMPT
    rows: int = 16
    weights: str = "softmax"
    heads: str = "max"
    pool: str = "max"
    pool_size: int = 33
    first: int = 4
    last: int = 64
    continues: int = 0
    calibration: Path | None = None
    origin: str = "stated"

    def __post_init__(self) -> None:
        if self.k is not None:
            _check_k(self.k, self.first + self.last)
        for name, values in SETTINGS.items():
            if getattr(self, name) not in values:
                raise BadOption(
                    f"gem's {name} is {getattr(self, name)!r}, one of {', '.join(values)} is wanted"
                )
        if not 1 <= self.rows <= MAX_ROWS:
            raise BadOption(f"gem's rows is {self.rows}, 1 to {MAX_ROWS} are wanted")
        if self.pool_size < 1 or self.pool_size % 2 == 0:
            raise BadOption(f"gem's pool_size is {self.pool_size}, an odd number is wanted")
        if min(self.first, self.last, self.min_prompt) < 0:
            raise BadOption("gem's first, last and min_prompt are counts: 0 or more are wanted")

    def resolve(self, spec: ModelSpec) -> Gem:
        """Settle k, the layer and what follows; raises `BadOption` where the model has no such layer."""
        found = self._found(spec)
        layer, k, origin = self.layer, self.k, self.origin
        if layer is None:
            layer, origin = _default_layer(found, spec)
            if found is not None and self.k not in (None, found.k):
                origin = f"calibrated with k {found.k}"
        if k is None:
            k = max(found.k if found else DEFAULT_K, self.first + self.last)
        if not 0 <= layer < spec.num_layers:
            raise BadOption(
                f"gem's layer is {layer}; {spec.name} has layers 0 to {spec.num_layers - 1}"
            )
        if not self.then.uses_native_kernels or isinstance(self.then, Gem | Delta | DeltaBlocks):
            raise BadOption(f"gem's then is {self.then.name!r}, dense or tidal is wanted")
        return replace(self, k=k, layer=layer, then=self.then.resolve(spec), origin=origin)

    def _found(self, spec: ModelSpec) -> GemCalibration | None:
        """The calibration that is asked for, or the model's where something is open and the rule is its."""
        if self.calibration is not None:
            found = load_gem_calibration(self.calibration, spec)
            if not found.has_rule(self.rule_settings):
                raise BadOption(
                    f"the calibration {self.calibration} was made for another rule: leave "
                    f"{', '.join(RULE)} as they were then"
                )
            return found
        if self.layer is not None and self.k is not None:
            return None
        known = find_gem_calibration(spec)
        return known if known is not None and known.has_rule(self.rule_settings) else None

    @property
    def num_selections(self) -> int:
        """As many as what follows has."""
        return self.then.num_selections

    @property
    def cache_key(self) -> str:
        """Every setting: the same tokens under another one may be others."""
        settings = replace(self, then=Dense(), calibration=None, origin="")
        return repr(settings) + self.then.cache_key

    @property
    def rule(self) -> ScoreRule:
        """How a layer's rows and heads score a key."""
        return ScoreRule(self.rows, self.weights == "softmax", self.heads == "max")

    @property
    def filter_prefill(self) -> FilterPrefill:
        """What a plan must know; the policy is fitted."""
        assert self.layer is not None and self.k is not None, "the policy is not fitted to a model"
        least = max(self.min_prompt, self.first + self.last)
        return FilterPrefill(num_layers=self.layer + 1, k=self.k, min_tokens=least)

    @property
    def rule_settings(self) -> dict[str, Any]:
        """The rule by the names of its settings."""
        return {name: getattr(self, name) for name in RULE}

    def applies_to(self, num_tokens: int) -> bool:
        """Whether a prompt of so many tokens is filtered."""
        return num_tokens > max(self.min_prompt, self.budget(num_tokens))

    def budget(self, num_tokens: int) -> int:
        """Return how many tokens of a prompt are kept."""
        k = DEFAULT_K if self.k is None else self.k
        return max(retained_tokens(k, num_tokens), self.first + self.last)

    def install(self, hook: AttentionKernels, spec: ModelSpec) -> PassController:
        """Attend to what was kept as the other policy does."""
        assert isinstance(self.then, Dense | Tidal), "the policy is fitted to a model"
        return self.then.install(hook, spec)

    def __str__(self) -> str:
        k = f"{self.k:.0%}" if self.k is not None and self.k < 1 else self.k
        return f"gem, k {k}, layer {self.layer} ({self.origin}), then {self.then}"


def kept_positions(scores: NDArray[np.float32], policy: Gem) -> NDArray[np.int64]:
    """Return the positions of a prompt that are kept, in order, by its keys' scores, shape (tokens,).

    Of equal scores the earlier one is kept.
    """
    import numpy as np

    ranked = _ranked(scores, policy)
    best = np.argsort(-ranked, kind="stable")[: policy.budget(len(scores))]
    kept: NDArray[np.int64] = np.sort(best)
    return kept


def are_kept(positions: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> bool:
    """Whether every token of `spans`, each a begin and an end, is among the kept ones."""
    kept = set(positions.tolist())
    return all(kept.issuperset(range(begin, end)) for begin, end in spans)


def needed_k(scores: NDArray[np.float32], policy: Gem, spans: Sequence[tuple[int, int]]) -> int:
    """Return the k that surely keeps every token of `spans`.

    All tokens count that score no less than the lowest of them: where a layer does not see the spans,
    that is the whole prompt.
    """
    ranked = _ranked(scores, policy)
    lowest = min(ranked[begin:end].min() for begin, end in spans)
    return int((ranked >= lowest).sum())


def _ranked(scores: NDArray[np.float32], policy: Gem) -> NDArray[np.float32]:
    """What tokens are chosen by: pooled, and without end where they are kept in any case."""
    import numpy as np

    ranked = pooled(scores, policy.pool, policy.pool_size)
    ranked[: policy.first] = np.inf
    ranked[len(ranked) - min(policy.last, len(ranked)) :] = np.inf
    return ranked


def pooled(scores: NDArray[np.float32], pool: str, size: int) -> NDArray[np.float32]:
    """Return every score's pool over the `size` around it; beyond the ends a mean takes zeros."""
    import numpy as np

    half = size // 2
    if pool == "mean":
        return np.convolve(scores, np.full(size, 1 / size, np.float32), mode="full")[
            half : half + len(scores)
        ].astype(np.float32)
    padded = np.pad(scores, half, constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)
    largest: NDArray[np.float32] = windows.max(axis=1)
    return largest


def _default_layer(found: GemCalibration | None, spec: ModelSpec) -> tuple[int, str]:
    """The layer that chooses where none is stated, and where it comes from."""
    if found is not None:
        return found.layer, found.summary
    if spec.sliding_window is not None:
        raise BadOption(
            f"gem needs a layer that sees the whole prompt, and {spec.name} has sliding windows: name "
            "one, gem:layer=N, or run lowtide calibrate --attention gem"
        )
    return spec.num_layers // 4, "default layer: not calibrated for this model"


def _check_k(k: int | float, forced: int) -> None:
    if k <= 0 or (k >= 1 and k != int(k)):
        raise BadOption(
            f"gem's k is {k}: a number of tokens, or a fraction of the prompt, is wanted"
        )
    if 1 <= k < forced:
        raise BadOption(
            f"gem's k is {k}: {forced} tokens are always kept (first and last), at least as many are wanted"
        )

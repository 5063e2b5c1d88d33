"""GemFilter: all layers read only the prompt tokens that the prompt's end attends to in an early layer.

Shi et al., "Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token
Reduction", arXiv 2409.17422, Algorithm 1. The paper scores keys by the last query's raw q·k products, summed
over heads and averaged over 5 neighbours. With that rule the models measured here lose most passkeys. The
default differs: a key's score is the largest softmax weight that any head of the last 16 queries gives to
it, max-pooled over 16 neighbours on either side, and the first and last tokens are always retained. The
paper's rule is `Gem(rows=1, weights="raw", heads="sum", pool="mean", pool_size=5, first=0, last=0)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.calibration import Calibration, find_calibration, load_calibration
from lowtide.attention.calibrator import Calibrator
from lowtide.attention.dense import Dense
from lowtide.attention.gem.selection import CHOICES, MAX_ROWS, RULE_FIELDS, GemSelection, check_k
from lowtide.attention.policy import (
    CALIBRATION,
    USER,
    AttentionPolicy,
    CalibratedPolicy,
    PassController,
    Setting,
    read_k,
)
from lowtide.attention.settings import Ranges, file_field, number_of_keys, set_fields, whole_fields
from lowtide.memory.plan.attention import (
    NO_ATTENTION_MEMORY,
    AttentionMemory,
    FilterPrefill,
    retained_tokens,
)
from lowtide.memory.plan.estimates import attention_bytes, padded_context
from lowtide.models.arguments.values import MOST, choice, flag, shown
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec

DEFAULT_K = 512
DEFAULT_MIN_PROMPT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GemMemory(AttentionMemory):
    """Scores of a prompt's keys, beside the memory of the policy that follows the filter."""

    following: AttentionMemory = NO_ATTENTION_MEMORY

    @property
    def description(self) -> str:
        """That of the policy that follows."""
        return self.following.description

    def scratch_bytes(self, spec: ModelSpec, context: int, threads: int) -> int:
        """Return the bytes of attention of one query at a time with its scores by head, of a score a key,
        and of the arrays for the selection (40 bytes a token)."""
        slots = padded_context(context)
        scores = 4 * spec.num_heads * (slots + 2) + 4 * slots
        scoring = attention_bytes(spec, context, threads) + scores + 40 * slots
        return scoring + self.following.scratch_bytes(spec, context, threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gem(AttentionPolicy):
    """GemFilter: retain `k` tokens (below 1: a share of the prompt) of prompts above `min_prompt` tokens.

    `layer`, counted from 0, selects them. If layer and k are None they come from the model's calibration, or
    are a quarter of the layers and 512; `calibration` is a file to use instead. `rows` (queries), `weights`,
    `heads`, `pool` and `pool_size` are the score's rule; the `first` and `last` tokens are always retained.
    `then` attends to the retained tokens. For questions about a text: the continuation of a text loses what
    its end does not attend to, and so `continues` must be set for plain completion.
    """

    name: ClassVar[str] = "gem"
    settings: ClassVar[tuple[Setting, ...]] = (
        Setting("k", read_k, "a number of tokens or a percentage"),
        Setting("layer"),
        CALIBRATION,
    )

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
    continues: bool = False
    calibration: Path | None = None
    source: str = USER

    def __post_init__(self) -> None:
        counts: Ranges = {
            "rows": (1, MAX_ROWS),
            "pool_size": 1,
            "first": 0,
            "last": 0,
            "min_prompt": 0,
        }
        set_fields(self, whole_fields(self, {**counts, "layer": (-MOST, MOST)}))
        set_fields(
            self,
            {
                "k": number_of_keys("gem's k", self.k),
                "continues": flag("gem's continues", self.continues),
                "calibration": file_field("gem's calibration", self.calibration),
            },
        )
        if self.k is not None:
            check_k(self.k, self.first + self.last)
        for name, values in CHOICES.items():
            choice(f"gem's {name}", getattr(self, name), values)
        if self.pool_size % 2 == 0:
            raise BadOption(f"gem's pool_size is {self.pool_size}; it must be an odd number")
        if not isinstance(self.then, AttentionPolicy):
            raise BadOption(
                f"gem's then is {shown(self.then)}; it must be a policy, such as Dense()"
            )

    @classmethod
    def calibrated(
        cls, spec: ModelSpec, prompt_tokens: int, num_tokens: int
    ) -> list[CalibratedPolicy]:
        """Return the calibrated filter for a prompt that it would shorten; answers to questions were counted."""
        found = find_calibration(cls.name, spec)
        if found is None:
            return []
        policy = cls().resolve(spec)
        if not policy.selection.applies_to(prompt_tokens):
            return []
        retained = retained_tokens(policy.selection.k, prompt_tokens)
        filtered = (policy.selection.layer + 1) / spec.num_layers
        answers = f"{found.metric('num_answered')} of {found.metric('num_dense_answered')} answers"
        return [
            CalibratedPolicy(
                policy=policy,
                distance=f"{answers} kept at {found.context:,} tokens",
                kl=None,
                keys_read=(num_tokens - prompt_tokens + retained) / num_tokens,
                prompt_computed=min(filtered + retained / prompt_tokens, 1.0),
            )
        ]

    def resolve(self, spec: ModelSpec) -> Gem:
        """Fill in k, the layer, and the policy that follows; raises `BadOption` for an unknown layer."""
        found = self._calibration(spec)
        layer, k, source = self.layer, self.k, self.source
        if layer is None:
            layer, source = _default_layer(found, spec)
            if found is not None and self.k not in (None, found.count("k")):
                source = f"calibrated with k {found.count('k')}"
        if k is None:
            k = max(found.count("k") if found else DEFAULT_K, self.first + self.last)
        if not 0 <= layer < spec.num_layers:
            raise BadOption(
                f"gem's layer is {layer}; {spec.name} has layers 0 to {spec.num_layers - 1}"
            )
        if not self.then.can_follow_filter:
            raise BadOption(f"gem's then is {self.then.name!r}; it must be dense or tidal")
        return replace(self, k=k, layer=layer, then=self.then.resolve(spec), source=source)

    def _calibration(self, spec: ModelSpec) -> Calibration | None:
        """Return the file that the user chose, or the model's own if it is needed and has the same rule."""
        rule = {name: getattr(self, name) for name in RULE_FIELDS}
        if self.calibration is not None:
            found = load_calibration(self.calibration, self.name, spec)
            if _checked_rule(found) != rule:
                raise BadOption(
                    f"the calibration {self.calibration} was made with another rule: leave "
                    f"{', '.join(RULE_FIELDS)} at its values"
                )
            return found
        if self.layer is not None and self.k is not None:
            return None
        known = find_calibration(self.name, spec)
        return known if known is not None and _checked_rule(known) == rule else None

    @property
    def selection(self) -> GemSelection:
        """The rule that selects tokens, of the resolved policy."""
        assert self.layer is not None and self.k is not None, "the policy is not resolved"
        return GemSelection(
            layer=self.layer,
            k=self.k,
            min_prompt=self.min_prompt,
            **{name: getattr(self, name) for name in RULE_FIELDS},
        )

    @property
    def prompt_selector(self) -> GemSelection:
        """The rule that selects tokens."""
        return self.selection

    @property
    def following(self) -> AttentionPolicy:
        """The policy that attends to the retained tokens."""
        return self.then

    @property
    def shares_selection(self) -> bool:
        """As the policy that follows."""
        return self.then.shares_selection

    @property
    def cache_key(self) -> str:
        """All settings: the same tokens under other settings may have other keys and values."""
        return repr(replace(self, then=Dense(), calibration=None, source="")) + self.then.cache_key

    @property
    def memory(self) -> GemMemory:
        """A prefill through the first layers, and scores."""
        assert self.layer is not None and self.k is not None, "the policy is not resolved"
        least = max(self.min_prompt, self.first + self.last)
        prefill = FilterPrefill(num_layers=self.layer + 1, k=self.k, min_tokens=least)
        return GemMemory(filter_prefill=prefill, following=self.then.memory)

    def configure(self, kernels: AttentionKernels, spec: ModelSpec) -> PassController:
        """Attend to the retained tokens as the policy that follows does."""
        return self.then.configure(kernels, spec)

    @property
    def completion_refusal(self) -> str | None:
        """A refusal, unless `continues` is set."""
        if self.continues:
            return None
        return (
            "gem retains what a question attends to, and makes the continuation of a text worse: ask in a "
            "chat, or open with attention=Gem(continues=True)"
        )

    @property
    def calibrator(self) -> Calibrator:
        """Finds the layer for this policy's rule and k."""
        from lowtide.attention.gem.calibrate import GemCalibrator

        def selection(layer: int, k: int) -> GemSelection:
            return replace(self, layer=layer, k=k).selection

        return GemCalibrator(
            selection, GemMemory(), self.layer, self.k, has_file=self.calibration is not None
        )

    def describe(self) -> str:
        """Name k, the layer, its source, and the policy that follows."""
        k = f"{self.k:.0%}" if self.k is not None and self.k < 1 else self.k
        return f"gem, k {k}, layer {self.layer} ({self.source}), then {self.then}"


def _checked_rule(found: Calibration) -> dict[str, Any]:
    """Return the rule of a calibration; raises `CalibrationError` if it is incomplete."""
    return {
        **{name: found.count(name) for name in ("rows", "pool_size")},
        **{name: found.word(name) for name in CHOICES},
        **{name: found.count(name, least=0) for name in ("first", "last")},
    }


def _default_layer(found: Calibration | None, spec: ModelSpec) -> tuple[int, str]:
    """Return the layer that selects if the user named none, and its source."""
    if found is not None:
        layer = found.count("layer", least=0)
        if layer >= spec.num_layers:
            raise found.param_error("layer", f"a layer of {spec.name}, 0 to {spec.num_layers - 1}")
        return layer, (
            f"calibrated: {found.metric('num_answered')} of {found.metric('num_dense_answered')} answers "
            f"kept at {found.context:,} tokens"
        )
    if not spec.full_layers:
        raise BadOption(
            f"gem needs a layer that sees the whole prompt, and {spec.name} has sliding windows: name a "
            "layer, as in gem:layer=7, or run lowtide calibrate --attention gem"
        )
    later = (layer for layer in spec.full_layers if layer >= spec.num_layers // 4)
    layer = next(later, spec.full_layers[-1])
    return layer, "default layer: not calibrated for this model"

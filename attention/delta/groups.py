"""Delta by whole tokens: similar keys behind the window share one score and one value.

A key joins the most similar keys of its page of 64, by key and value (Ward's clustering). A group is
represented by the mean of its keys and the mean of its values, so that half of attention is neither
multiplied nor read, of V as of K. See `fit_score_bias` for the correction of the group's score.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.bindings.structs import DeltaRowsRule
from lowtide.attention.calibration import Calibration
from lowtide.attention.delta.head_params import (
    FULL_SCALE,
    PAGE_KEYS,
    Span,
    StartPass,
    cheapest,
    layer_words,
    number_words,
    read_numbers,
    read_scales,
    refine_bytes,
    scale_array,
    scale_words,
)
from lowtide.memory.plan.attention import AttentionMemory
from lowtide.memory.plan.estimates import attention_bytes, padded_context
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_GROUPS = 8
BIAS_SHARES = (0.0, 0.06, 0.12, 0.2, 0.3, 0.45, 0.7, 1.0)
"""Shares of the Jensen term that `fit_score_bias` tries."""

ScoreBias = tuple[tuple[float, ...], ...]
"""A factor for each layer and KV head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMemory(AttentionMemory):
    """Groups in half precision beside the KV cache: `num_groups` of a page of each KV head with groups."""

    num_groups: tuple[int, ...]
    window: int
    refines: bool

    @property
    def description(self) -> str:
        """What is held."""
        return "groups of keys beside the cache"

    def scratch_bytes(self, spec: ModelSpec, context: int, threads: int) -> int:
        """Return the bytes of the groups, of a scratch as dense attention has it, and of refining."""
        slots = padded_context(context)
        held = self.num_bytes(slots, spec.key_head_dim, spec.value_head_dim)
        refining = refine_bytes(spec, self.most_keys(slots), threads) if self.refines else 0
        return held + attention_bytes(spec, context, threads) + refining

    def most_keys(self, num_slots: int) -> int:
        """Return the most groups and exact keys that a KV head has for `num_slots` slots."""
        return num_slots // PAGE_KEYS * max(self.num_groups, default=0) + self._exact(num_slots)

    def num_bytes(self, num_slots: int, head_dim: int, value_dim: int) -> int:
        """Return the bytes of the groups, the masks of 64 queries, and each key's group index."""
        pages, exact = num_slots // PAGE_KEYS, self._exact(num_slots)
        rows = sum(pages * groups + exact for groups in self.num_groups)
        masks = PAGE_KEYS * self.most_keys(num_slots)
        biases = pages * sum(self.num_groups)
        halves = rows * (head_dim + value_dim) + biases + masks
        return 2 * halves + len(self.num_groups) * num_slots

    def _exact(self, num_slots: int) -> int:
        return min(self.window + 3 * PAGE_KEYS, num_slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGroups:
    """Delta's parameters by tokens, for each layer and KV head.

    `num_groups` is the number of groups of a page of 64 keys (64: nothing is grouped). `scales`, a byte a
    channel, weight the channels in the distance of two keys. `score_bias` times the mean square of a group's
    distances from its mean is added to the group's unscaled scores, see `fit_score_bias`; 0 if the queries
    are not known.
    """

    num_groups: tuple[tuple[int, ...], ...]
    score_bias: ScoreBias
    scales: tuple[tuple[bytes, ...], ...]

    @staticmethod
    def uniform(num_layers: int, num_kv_heads: int, head_dim: int, num_groups: int) -> HeadGroups:
        """Return the same parameters for every head, with channels of the same weight."""
        return HeadGroups(
            num_groups=((num_groups,) * num_kv_heads,) * num_layers,
            score_bias=((0.0,) * num_kv_heads,) * num_layers,
            scales=((bytes([FULL_SCALE]) * head_dim,) * num_kv_heads,) * num_layers,
        )

    def without(self, layers: Collection[int]) -> HeadGroups:
        """Return the parameters with these layers dense."""
        return replace(
            self,
            num_groups=tuple(
                (PAGE_KEYS,) * len(counts) if layer in layers else counts
                for layer, counts in enumerate(self.num_groups)
            ),
        )

    @staticmethod
    def of(found: Calibration, spec: ModelSpec) -> HeadGroups:
        """Return the parameters of a calibration; raises `CalibrationError`."""
        return HeadGroups(
            num_groups=_read_groups(found, spec),
            score_bias=read_numbers(found, "score_bias", spec, 0.0),
            scales=read_scales(found, spec),
        )

    def to_params(self) -> dict[str, object]:
        """Return the params of a calibration file: a text for each layer."""
        return {
            "num_groups": [" ".join(map(str, layer)) for layer in self.num_groups],
            "score_bias": number_words(self.score_bias),
            "scales": scale_words(self.scales),
        }

    @property
    def sparsity(self) -> float:
        """The share of the keys of grouped pages that costs nothing, a mean over KV heads."""
        counts = [count for layer in self.num_groups for count in layer]
        return 1 - sum(counts) / (PAGE_KEYS * len(counts))

    def grouped(self) -> tuple[int, ...]:
        """Return the numbers of groups of all heads of the layers that have groups."""
        layers = [counts for counts in self.num_groups if min(counts) < PAGE_KEYS]
        return tuple(count for counts in layers for count in counts)

    def memory(self, span: Span) -> GroupMemory:
        """Return the memory of the groups."""
        return GroupMemory(num_groups=self.grouped(), window=span.window, refines=span.refine > 0)

    def configure(self, kernels: AttentionKernels, span: Span) -> StartPass:
        """Set each head's groups."""
        kernels.set_groups(DeltaRowsRule(span.window, span.sinks, span.refine), *self.arrays())
        return kernels.start_grouped

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
        """Return groups and score bias, (layers, kv_heads), and scales, (layers, kv_heads, head_dim)."""
        import numpy as np

        return (
            np.array(self.num_groups, np.uint8),
            np.array(self.score_bias, np.float32),
            scale_array(self.scales).astype(np.float32),
        )

    def describe(self) -> str:
        """Name the sparsity."""
        return f"sparsity {self.sparsity:.0%}"


def fit_score_bias(
    squares: NDArray[np.float32], errors_with: Callable[[ScoreBias], NDArray[np.float32]]
) -> ScoreBias:
    """Return the score bias of each KV head that brings its output nearest to dense attention.

    A group is scored as its mean m, and gets the weight exp(q·m). The mean weight of its keys is larger
    (Jensen's inequality): if their scores were normally distributed, by the factor exp(variance / 2), where
    the variance is the queries' mean squares times the keys', channel by channel. They are not, least of all
    for a query that looks for one of the keys; so each head takes a share of that term.
    `squares` (layers, kv_heads) are the mean squares of the queries' largest channel; `errors_with` measures
    the errors of all heads, of the same shape, with a score bias.
    """
    import numpy as np

    biases = [_rounded(np.float32(share / 2) * squares) for share in BIAS_SHARES]
    picked = np.stack([errors_with(score_bias) for score_bias in biases]).argmin(axis=0)
    return tuple(
        tuple(biases[choice][layer][head] for head, choice in enumerate(choices))
        for layer, choices in enumerate(picked)
    )


def _rounded(score_bias: NDArray[np.float32]) -> ScoreBias:
    """Round as the calibration file does."""
    return tuple(tuple(float(f"{bias:.4g}") for bias in layer) for layer in score_bias)


def allocate(
    errors: NDArray[np.float32], choices: tuple[int, ...], share: float
) -> tuple[tuple[int, ...], ...]:
    """Return each KV head's number of groups, so that all keep `share` of the keys at the least error.

    `errors` (choices, layers, kv_heads) are the heads' errors with so many groups, of ascending `choices`;
    64 groups have no error. A head with infinite errors keeps everything, and does not count.
    """
    import numpy as np

    shares = np.broadcast_to(np.array(choices)[:, None, None] / PAGE_KEYS, errors.shape)
    picked = cheapest(np.minimum.accumulate(errors, axis=0), shares, share)
    assert picked is not None, "no head can be grouped, or the share is below the smallest choice"
    counts = np.array([*choices, PAGE_KEYS])
    return tuple(tuple(map(int, layer)) for layer in counts[picked])


def _read_groups(found: Calibration, spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    expected = f"{LEAST_GROUPS} to {PAGE_KEYS} for each KV head of {spec.num_layers} layers"
    layers = layer_words(found, "num_groups", spec, expected)
    numbers = [tuple(int(word) for word in layer if word.isdecimal()) for layer in layers]
    if any(
        len(layer) != heads or not all(LEAST_GROUPS <= n <= PAGE_KEYS for n in layer)
        for layer, heads in zip(numbers, spec.num_kv_heads, strict=True)
    ):
        raise found.param_error("num_groups", expected)
    return tuple(numbers)

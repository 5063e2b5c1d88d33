"""What delta's two kinds of parameters, one set for each layer and KV head, have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lowtide.attention.bindings.policy import AttentionKernels
from lowtide.attention.calibration import Calibration
from lowtide.memory.plan.attention import AttentionMemory
from lowtide.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE_KEYS = 64
"""Keys of a page: only keys of one page are merged."""
FULL_SCALE = 255
STEPS = 8 * PAGE_KEYS
"""`cheapest` divides the budget of a KV head into so many steps."""


@dataclass(frozen=True, slots=True)
class Span:
    """Which keys stay exact: the last `window` of each query, the first `sinks` of the context.

    `refine` is the share of a head's attention weight above which a merged key is read exactly.
    """

    window: int
    sinks: int
    refine: float


class StartPass(Protocol):
    """The function that has the next forward passes attend to merged keys."""

    def __call__(self, *, refine: bool) -> None:
        """Attend to merged keys; with `refine`, read those with much weight exactly."""


class HeadParams(Protocol):
    """Says, for each layer and KV head, how much is merged."""

    @property
    def sparsity(self) -> float | None:
        """The share that is neither multiplied nor read; None if it is not known."""

    def memory(self, span: Span) -> AttentionMemory:
        """Return the memory of what stands for the keys."""

    def configure(self, kernels: AttentionKernels, span: Span) -> StartPass:
        """Configure the kernels, and return what starts a pass."""

    def to_params(self) -> dict[str, object]:
        """Return the params of a calibration file."""

    def describe(self) -> str:
        """Describe how much is merged."""


def refine_bytes(spec: ModelSpec, num_keys: int, threads: int) -> int:
    """Return the bytes of refining: the scores of `num_keys` keys for a few tokens, and partial sums.

    The numbers of tokens and of waiting keys are those of `native/sparse/refine.h`.
    """
    most_tokens, most_waiting = 4, 256
    group = -(-spec.num_heads // max(min(filter(None, spec.num_kv_heads), default=1), 1))
    # Whole blocks of scores, and three numbers of each query's softmax.
    scores = most_tokens * spec.num_heads * 4 * (num_keys + PAGE_KEYS + 3)
    sums = 2 * group * 4 * (2 + spec.value_head_dim)
    return scores + threads * (sums + 2 * 4 * most_waiting)


def scale_bytes(squares: NDArray[np.float32]) -> tuple[tuple[bytes, ...], ...]:
    """Return channel scales, a byte each, from the mean squares of the queries' channels.

    `squares` is (layers, kv_heads, head_dim). A scale is the channel's root mean square relative to the
    head's largest.
    """
    import numpy as np

    query_rms = np.sqrt(squares)
    largest = np.maximum(query_rms.max(axis=2, keepdims=True), 1e-30)
    scales = np.maximum(np.round(query_rms / largest * FULL_SCALE), 1).astype(np.uint8)
    return tuple(tuple(head.tobytes() for head in layer) for layer in scales)


def scale_array(scales: Sequence[Sequence[bytes]]) -> NDArray[np.float64]:
    """Return channel scales as numbers up to 1, (layers, kv_heads, head_dim)."""
    import numpy as np

    numbers: NDArray[np.float64] = np.array([[list(head) for head in layer] for layer in scales])
    return numbers / FULL_SCALE


def cheapest(
    errors: NDArray[np.float32], shares: NDArray[np.floating[Any]], most: float
) -> NDArray[np.intp] | None:
    """Return which choice each KV head takes, so that all keep the share `most` at the least error.

    `errors` and `shares` (choices, layers, kv_heads) are what a head loses and keeps with a choice; one more
    choice keeps everything and loses nothing. The result (layers, kv_heads) is optimal in steps of
    1 / `STEPS`, rounded up: dynamic programming over what the heads up to each one keep. A head with
    infinite errors does not count, and keeps everything. None if the smallest choices keep more than `most`.
    """
    import numpy as np

    counts = np.isfinite(errors).all(axis=0)
    costs = np.concatenate([errors, np.zeros_like(errors[:1])])[:, counts].astype(np.float64)
    kept = np.concatenate([shares, np.ones_like(shares[:1])])[:, counts]
    steps = np.ceil(kept * STEPS - 1e-6).astype(int)
    num_heads = int(counts.sum())
    room = int(most * STEPS * num_heads + 1e-6)
    least, choices = np.zeros(room + 1), []
    for head in range(num_heads):
        by_choice = np.full((len(costs), room + 1), np.inf)
        for choice, step in enumerate(steps[:, head].tolist()):
            by_choice[choice, step:] = least[: max(room + 1 - step, 0)] + costs[choice, head]
        choices.append(by_choice.argmin(axis=0))
        least = by_choice.min(axis=0)
    if not num_heads or not np.isfinite(least[room]):
        return None
    picked = np.zeros(num_heads, np.intp)
    for head in reversed(range(num_heads)):
        picked[head] = choices[head][room]
        room -= int(steps[picked[head], head])
    found = np.full(counts.shape, len(errors), np.intp)
    found[counts] = picked
    return found


def number_words(numbers: Sequence[Sequence[float]]) -> list[str]:
    """Return each layer's numbers as one text, for a calibration file."""
    return [" ".join(f"{number:g}" for number in layer) for layer in numbers]


def scale_words(scales: Sequence[Sequence[bytes]]) -> list[str]:
    """Return each layer's channel scales as one text, in hex, for a calibration file."""
    return [" ".join(head.hex() for head in layer) for layer in scales]


def read_numbers(
    found: Calibration, name: str, spec: ModelSpec, least: float, most: float = 1e9
) -> tuple[tuple[float, ...], ...]:
    """Return a param: each KV head's number, from `least` to `most`."""
    expected = f"numbers from {least:g} to {most:g} for each KV head of {spec.num_layers} layers"
    try:
        numbers = [tuple(map(float, words)) for words in layer_words(found, name, spec, expected)]
    except ValueError:
        raise found.param_error(name, expected) from None
    if any(
        len(layer) != heads or not all(least <= number <= most for number in layer)
        for layer, heads in zip(numbers, spec.num_kv_heads, strict=True)
    ):
        raise found.param_error(name, expected)
    return tuple(numbers)


def read_scales(found: Calibration, spec: ModelSpec) -> tuple[tuple[bytes, ...], ...]:
    """Return the param `scales`: each KV head's scales, a byte a channel."""
    expected = f"{spec.key_head_dim} bytes in hex for each KV head of {spec.num_layers} layers"
    try:
        layers = [
            tuple(bytes.fromhex(word) for word in layer)
            for layer in layer_words(found, "scales", spec, expected)
        ]
    except ValueError:
        raise found.param_error("scales", expected) from None
    for layer, heads in zip(layers, spec.num_kv_heads, strict=True):
        if len(layer) != heads or any(len(head) != spec.key_head_dim for head in layer):
            raise found.param_error("scales", expected)
    return tuple(layers)


def layer_words(found: Calibration, name: str, spec: ModelSpec, expected: str) -> list[list[str]]:
    """Return the words of each layer's text."""
    layers = found.params.get(name)
    if (
        not isinstance(layers, list)
        or len(layers) != spec.num_layers
        or not all(isinstance(layer, str) for layer in layers)
    ):
        raise found.param_error(name, expected)
    return [layer.split() for layer in layers]

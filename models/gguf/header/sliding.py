"""Which layers of a GGUF model attend to a sliding window: by its header, else by what llama.cpp knows of its kind."""

from __future__ import annotations

from collections.abc import Mapping

from lowtide.models.gguf.header.reader import ArrayValue, Scalar

PATTERN = "attention.sliding_window_pattern"
PERIODS = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "olmo2": 4,
}
"""Of so many layers the last one sees the whole context. llama.cpp has these numbers where a header has none."""


def sliding_layers(
    metadata: Mapping[str, Scalar | ArrayValue], architecture: str, num_layers: int
) -> tuple[int, ...] | None:
    """Return the layers with a sliding window, counted from 0; None where that is not known.

    A header has a flag for each layer, or the period, or nothing.
    """
    pattern = metadata.get(f"{architecture}.{PATTERN}", PERIODS.get(architecture))
    if isinstance(pattern, ArrayValue):
        flags = pattern.values
        if flags is None or len(flags) < num_layers:
            return None
        return tuple(layer for layer in range(num_layers) if flags[layer])
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 1:
        return None
    return tuple(layer for layer in range(num_layers) if (layer + 1) % pattern)

"""Attender: the seam to whatever attends between the pieces. It is handed in; models know no attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowtide.models.onnx.cut.attention_node import AttentionNode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerArrays:
    """What a layer's attention reads and writes, room for the most rows of a pass.

    `query` and `out` (rows, width), `key` and `value` (rows, kv_width), views of which a row's channels are
    contiguous; the caches (cells, kv_heads, head_size); `cosines` and `sines` (positions, pairs) or None.
    """

    node: AttentionNode
    query: NDArray[np.generic]
    key: NDArray[np.generic]
    value: NDArray[np.generic]
    out: NDArray[np.generic]
    key_cache: NDArray[np.generic]
    value_cache: NDArray[np.generic]
    cosines: NDArray[np.float32] | None
    sines: NDArray[np.float32] | None


class Attender(ABC):
    """Attends layer by layer; what it is told of the arrays holds until it is told anew."""

    @abstractmethod
    def bind(self, layers: list[LayerArrays]) -> None:
        """Know every layer's arrays, which the model keeps as long as it lives."""

    @abstractmethod
    def start(
        self, num_past: int, num_rows: int, biases: Mapping[str, NDArray[np.generic]]
    ) -> None:
        """Begin a pass of `num_rows` after `num_past` tokens.

        `biases` are of (1, 1, rows, num_past + num_rows), by name; booleans are true where a key is seen.
        """

    @abstractmethod
    def attend(self, layer: int) -> None:
        """Append the layer's keys and values to its cache, and write its attention to `out`."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; closing twice is allowed."""

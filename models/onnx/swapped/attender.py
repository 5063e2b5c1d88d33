"""Attender: the seam to whatever attends in a graph's place. It is handed in; models know no attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowtide.models.onnx.swapped.attention_node import AttentionNode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerArrays:
    """A layer's attention and what it keeps.

    The caches are (cells, kv_heads, head_size); `cosines` and `sines` (positions, pairs) or None.
    """

    node: AttentionNode
    key_cache: NDArray[np.generic]
    value_cache: NDArray[np.generic]
    cosines: NDArray[np.float32] | None
    sines: NDArray[np.float32] | None


class Attender(ABC):
    """Attends where a graph's node says so, by the operator that `library` has for onnxruntime."""

    library: Path
    domain: str
    number: int
    """What a node's attribute `attender` names it by."""

    @abstractmethod
    def operator(self, element: str) -> str:
        """Return the operator's name for rows of an element type, as numpy names it."""

    @abstractmethod
    def bind(self, layers: list[LayerArrays]) -> None:
        """Attend in every layer's arrays from the next pass on, until others are bound.

        The model keeps them as long as it lives. The same list again costs nothing.
        """

    @abstractmethod
    def begin(self, num_past: int, num_rows: int) -> None:
        """Say that the next pass has `num_rows` after `num_past` tokens."""

    @abstractmethod
    def cut(self, num_cells: int) -> None:
        """Say that the tokens from `num_cells` on are forgotten: what is kept of their cells is, too."""

    @property
    @abstractmethod
    def has_ended(self) -> bool:
        """Whether the last pass ended in a layer's attention, as was wanted, and not in an error."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; closing twice is allowed."""

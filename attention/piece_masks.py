"""PieceMasks: which keys the rows of a pass see, for every kind of layer of a graph that is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowtide.models.errors import ForwardError
from lowtide.models.onnx.cut.attention_node import AttentionNode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HIDING = -1e4
"""A bias from here down weighs nothing beside any other: the key is hidden, and is not read."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Where a mask (rows, keys) of halves lies."""

    address: int
    row_bytes: int


class PieceMasks:
    """Makes each mask once a pass, in room that the next pass uses again."""

    def __init__(self) -> None:
        self._room: dict[tuple[str, bool, int | None], NDArray[np.float16]] = {}
        self._made: dict[tuple[str, bool, int | None], Mask] = {}
        self._num_past = self._num_rows = 0
        self._biases: Mapping[str, NDArray[np.generic]] = {}

    def start(
        self, num_past: int, num_rows: int, biases: Mapping[str, NDArray[np.generic]]
    ) -> None:
        """Begin a pass; see `Attender.start`."""
        self._num_past, self._num_rows, self._biases = num_past, num_rows, biases
        self._made.clear()

    def of(self, node: AttentionNode) -> Mask:
        """Return the mask of a layer; raises `ForwardError` where its bias has another shape."""
        key = (node.bias, node.is_causal, node.window)
        if key not in self._made:
            mask = self._mask(key, node)
            self._made[key] = Mask(mask.ctypes.data, mask.strides[0])
        return self._made[key]

    def _mask(self, key: tuple[str, bool, int | None], node: AttentionNode) -> NDArray[np.float16]:
        import numpy as np

        num_keys = self._num_past + self._num_rows
        shape = (self._num_rows, num_keys)
        room = self._room.get(key)
        if room is None or room.size < shape[0] * shape[1]:
            # Twice as long as is wanted now: pages that are not written take no memory.
            room = self._room[key] = np.zeros(2 * shape[0] * shape[1], np.float16)
        mask = room[: shape[0] * shape[1]].reshape(shape)
        mask[:] = 0
        if node.bias:
            _write_bias(self._biases[node.bias], mask, node)
        if node.is_causal:
            for row in range(self._num_rows):
                seen = self._num_past + row + 1
                mask[row, seen:] = -np.inf
                if node.window is not None:
                    mask[row, : max(seen - node.window, 0)] = -np.inf
        return mask


def _write_bias(bias: NDArray[np.generic], mask: NDArray[np.float16], node: AttentionNode) -> None:
    import numpy as np

    shape = bias.shape[-2:]
    if bias.size != shape[0] * shape[1] or shape[1] != mask.shape[1]:
        raise ForwardError(
            f"the bias {node.bias} has the shape {bias.shape}, one for all heads over {mask.shape[1]} keys "
            "is wanted: leave attention out, and the graph runs whole"
        )
    values: NDArray[Any] = bias.reshape(shape)
    if values.dtype == bool:
        hides = np.logical_not(values)
    else:
        hides = np.less_equal(values, HIDING)
        mask[:] = np.where(hides, 0, values)
    mask[np.broadcast_to(hides, mask.shape)] = -np.inf

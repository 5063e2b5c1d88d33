"""HandOver: room for what goes from one piece to the next, used again as soon as it was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """A value of `width` channels a row, there from the moment `made` to the moment `read`."""

    name: str
    element: str
    width: int
    made: int
    read: int


def hand_over(values: list[Passed], max_rows: int) -> dict[str, NDArray[np.generic]]:
    """Return an array (1, max_rows, width) for each value.

    No two that are there at the same moment share room. Pages are taken when they are first written.
    """
    import numpy as np

    arrays: dict[str, NDArray[np.generic]] = {}
    rooms: list[tuple[int, NDArray[np.uint8]]] = []  # the last moment in use, and the bytes
    for value in sorted(values, key=lambda passed: passed.made):
        num_bytes = max_rows * value.width * np.dtype(value.element).itemsize
        index = next(
            (
                i
                for i, (end, room) in enumerate(rooms)
                if end < value.made and len(room) == num_bytes
            ),
            None,
        )
        if index is None:
            index = len(rooms)
            rooms.append((value.read, np.zeros(num_bytes, np.uint8)))
        room = rooms[index][1]
        rooms[index] = (value.read, room)
        arrays[value.name] = room.view(value.element).reshape(1, max_rows, value.width)
    return arrays

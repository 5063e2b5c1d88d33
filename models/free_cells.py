"""FreeCells: which cells of a cache hold no token. Knows no llama.cpp and no token."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush


class FreeCells:
    """Hands out the cells 0 to `num_cells` - 1, always the lowest that is free."""

    def __init__(self, num_cells: int) -> None:
        self._num_cells = num_cells
        self._untouched = 0
        """The lowest cell that was never handed out."""
        self._given_back: list[int] = []

    def __len__(self) -> int:
        """Return how many are free."""
        return self._num_cells - self._untouched + len(self._given_back)

    def take(self) -> int:
        """Return the lowest free cell, which is free no longer; raises `IndexError` where none is."""
        if self._given_back:
            return heappop(self._given_back)
        if self._untouched == self._num_cells:
            raise IndexError("no cell is free")
        self._untouched += 1
        return self._untouched - 1

    def give_back(self, cells: Iterable[int]) -> None:
        """Take back cells that were handed out."""
        for cell in cells:
            heappush(self._given_back, cell)

"""KvPages: the KV cache's memory follows the tokens in use.

Pages of cells that hold no token are given back to the system, and read as zeros when they are used again.
Giving back a cell that is in use would corrupt answers without an error, so the cache's layout is held
against its contents before the first page goes. Knows no tokens but their number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from lowtide.memory.pages import give_back, round_down, round_up
from lowtide.memory.untouched_buffers import UntouchedBuffer

LEAST_CELLS = 64
"""Fewer cells than these are kept: the next tokens take them again at once."""


class KvPages:
    """A cache of one sequence whose token i lies in cell i: appended to, and cut at its end.

    The cache is those of `buffers` that hold pairs of tensors, keys and values, of `num_cells` rows of
    `row_bytes`; where they are not `num_tensors` in all, everything is left alone. `num_unused` of them
    are never written to: passes end before their layers. Made before the first token.
    """

    def __init__(
        self,
        buffers: Sequence[UntouchedBuffer],
        *,
        num_tensors: int,
        num_cells: int,
        row_bytes: int,
        num_unused: int = 0,
    ) -> None:
        self._num_unused = num_unused
        self._row_bytes = row_bytes
        self._num_cells = num_cells
        tensor_bytes = num_cells * row_bytes
        tensors = [
            address
            for buffer in buffers
            if buffer.num_bytes % (2 * tensor_bytes) == 0
            for address in range(buffer.address, buffer.address + buffer.num_bytes, tensor_bytes)
        ]
        self._tensors = tensors if len(tensors) == num_tensors else []
        self._most_used = 0
        self._verified = False

    @property
    def is_working(self) -> bool:
        """Whether pages are given back."""
        return bool(self._tensors)

    def cut(self, num_used: int, num_kept: int) -> None:
        """Give back what lies behind the first `num_kept` cells; `num_used` held tokens until now."""
        self._most_used = max(self._most_used, num_used)
        if self._most_used - num_kept >= LEAST_CELLS:
            self._give_back_behind(num_kept)

    def trim(self, num_used: int) -> None:
        """Give back what lies behind the `num_used` cells that hold tokens, however little it is."""
        if self._most_used > num_used:
            self._give_back_behind(num_used)

    def _give_back_behind(self, num_kept: int) -> None:
        if not self._tensors:
            return
        if not self._verified and not self._is_as_thought():
            self._tensors = []
            return
        self._verified = True
        for address in self._tensors:
            first = round_up(address + num_kept * self._row_bytes)
            last = round_down(address + self._num_cells * self._row_bytes)
            if first < last:
                give_back(first, last - first)
        self._most_used = num_kept

    def _is_as_thought(self) -> bool:
        """Whether in every tensor the last cell that was used holds something, and no cell behind it does.

        It may be that of a token that was forgotten since: what was written stays until it is given back.
        """
        last, end = self._most_used - 1, min(self._most_used + LEAST_CELLS, self._num_cells)
        used = [address for address in self._tensors if self._holds(address, last)]
        return len(used) == len(self._tensors) - self._num_unused and not any(
            self._holds(address, cell)
            for address in self._tensors
            for cell in range(self._most_used, end)
        )

    def _holds(self, address: int, cell: int) -> bool:
        row = ctypes.string_at(address + cell * self._row_bytes, self._row_bytes)
        return row != bytes(self._row_bytes)

"""LogitsMemory: the logits of draft tokens, which go back to the ledger and the system where drafts do not pay."""

from __future__ import annotations

from lowtide.memory.budget import Ledger
from lowtide.memory.os.pages import PAGE_BYTES, release_pages, round_down, round_up
from lowtide.memory.plan.line import SPECULATION
from lowtide.memory.units import OverBudget
from lowtide.models.model import Model


class LogitsMemory:
    """Holds the plan's line for speculation at what passes of so many tokens need, of `planned_rows` at the most.

    The logits of a token lie once in llama.cpp's output and once in its graph. What lies in the output is released; the
    graph's memory is shared with other results, and stays.
    """

    def __init__(
        self, model: Model, ledger: Ledger, *, planned_rows: int, vocabulary_size: int
    ) -> None:
        self._model = model
        self._ledger = ledger
        self._planned_rows = planned_rows
        self._row_bytes = 4 * vocabulary_size
        self._planned_bytes = ledger.components[SPECULATION]

    def keep(self, num_rows: int) -> bool:
        """Keep logits of `num_rows` tokens of a pass; return whether there is room for them."""
        num_bytes = max(self._planned_bytes - self._released_bytes(num_rows), 0)
        try:
            self._ledger.reserve(SPECULATION, num_bytes)
        except OverBudget:
            return False
        return True

    def _released_bytes(self, num_rows: int) -> int:
        """Release the logits behind those of `num_rows` tokens; return by how much the plan's line is too large."""
        beyond = self._model.logits_beyond(num_rows)
        if beyond is None:
            return 0
        begin, end = round_up(beyond[0]), round_down(sum(beyond))
        if end > begin and not release_pages(begin, end - begin):
            return 0
        # The first and the last page are shared with what stays.
        return max((self._planned_rows - num_rows) * self._row_bytes - 2 * PAGE_BYTES, 0)

"""KeyGroups: what a plan must know of keys that are kept in groups, beside the cache or in its place.

Knows no policy.
"""

from __future__ import annotations

from dataclasses import dataclass

PAGE_KEYS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyGroups:
    """`num_groups` of each page of 64 keys, of each KV head that is grouped; `window` keys are not.

    The cells of `replaced_layers` are given back once groups stand for them.
    """

    num_groups: tuple[int, ...]
    window: int
    replaced_layers: tuple[int, ...] = ()

    def most_cells(self, num_cells: int, max_rows: int) -> int:
        """Return how many of so many cells a layer that is replaced keeps, in passes of `max_rows` rows."""
        return min(self.window + 2 * PAGE_KEYS + max_rows, num_cells)

    def num_bytes(self, num_cells: int, key_size: int, value_size: int) -> int:
        """Return the bytes of the groups of so many cells, in half precision, with the masks of 64 rows."""
        pages = num_cells // PAGE_KEYS
        beside = min(self.window + 3 * PAGE_KEYS, num_cells)
        rows = sum(pages * groups + beside for groups in self.num_groups)
        masks = PAGE_KEYS * (pages * max(self.num_groups, default=0) + beside)
        biases = pages * sum(self.num_groups)
        return 2 * (rows * (key_size + value_size) + biases + masks)

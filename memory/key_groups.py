"""KeyGroups: what a plan must know of keys that are kept in groups, beside the cache or in its place.

Knows no policy.
"""

from __future__ import annotations

from dataclasses import dataclass

PAGE_KEYS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyGroups:
    """`num_groups` of each page of 64 keys, of each KV head that is grouped; `window` keys are not.

    The cells of `replaced_layers` are given back once groups stand for them. `opened`: decoding looks into
    some groups.
    """

    num_groups: tuple[int, ...]
    window: int
    replaced_layers: tuple[int, ...] = ()
    opened: bool = False

    def most_cells(self, num_cells: int, max_rows: int) -> int:
        """Return how many of so many cells a layer that is replaced keeps, in passes of `max_rows` rows."""
        return min(self.window + 2 * PAGE_KEYS + max_rows, num_cells)

    def most_keys(self, num_cells: int) -> int:
        """Return how many groups of so many cells a KV head has at the most, with the keys beside them."""
        return num_cells // PAGE_KEYS * max(self.num_groups, default=0) + self._beside(num_cells)

    def num_bytes(self, num_cells: int, key_size: int, value_size: int) -> int:
        """Return the bytes of the groups of so many cells, in half precision, with the masks of 64 rows and
        which group each key is in."""
        pages, beside = num_cells // PAGE_KEYS, self._beside(num_cells)
        rows = sum(pages * groups + beside for groups in self.num_groups)
        masks = PAGE_KEYS * self.most_keys(num_cells)
        biases = pages * sum(self.num_groups)
        halves = rows * (key_size + value_size) + biases + masks
        return 2 * halves + len(self.num_groups) * num_cells

    def _beside(self, num_cells: int) -> int:
        return min(self.window + 3 * PAGE_KEYS, num_cells)

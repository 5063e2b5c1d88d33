"""TokenTree: tokens that may follow a text, each after another one of them. Pure; knows no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TEXT = -1
"""The parent of what follows the text itself."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Rows of a pass: row i is a token that comes after the row `parents[i]`, which stands before it.

    So any number of first rows is a tree, too. Raises `ValueError` where a parent does not stand before its
    row.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        fit = len(self.parents) == len(self.token_ids)
        if not fit or not all(TEXT <= parent < row for row, parent in enumerate(self.parents)):
            raise ValueError(f"parents are {self.parents}: each has to stand before its row")

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> TokenTree:
        """Return the tree in which each token follows the one before."""
        return cls(tuple(token_ids), tuple(range(TEXT, len(token_ids) - 1)))

    def behind(self, token_id: int) -> TokenTree:
        """Return the tree that is this one after a token, which is its row 0."""
        return TokenTree((token_id, *self.token_ids), (TEXT, *(p + 1 for p in self.parents)))

    def of_rows(self, rows: Sequence[int]) -> TokenTree:
        """Return the tree of these rows alone, in their order: a row's parent has to be one, before it."""
        places = {TEXT: TEXT, **{row: place for place, row in enumerate(rows)}}
        return TokenTree(
            tuple(self.token_ids[row] for row in rows),
            tuple(places[self.parents[row]] for row in rows),
        )

    def trunk_first(self) -> TokenTree:
        """Return the same tree with the rows of a longest path before all others."""
        depths = self.depths()
        trunk = self.path(depths.index(max(depths))) if depths else ()
        return self.of_rows([*trunk, *(row for row in range(len(self)) if row not in trunk)])

    def depths(self) -> list[int]:
        """Return how many rows stand before each one on its path."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent == TEXT else depths[parent] + 1)
        return depths

    def path(self, row: int) -> tuple[int, ...]:
        """Return the rows from the text to this one, itself the last."""
        rows = []
        while row != TEXT:
            rows.append(row)
            row = self.parents[row]
        return tuple(reversed(rows))

    def first_path(self) -> tuple[int, ...]:
        """Return the rows of the path that takes the first of the rows after each one."""
        rows, last = [], TEXT
        for row, parent in enumerate(self.parents):
            if parent == last:
                rows.append(row)
                last = row
        return tuple(rows)

    def later_siblings(self, row: int) -> list[int]:
        """Return the rows behind this one that come after the same row."""
        parent = self.parents[row]
        return [other for other in range(row + 1, len(self)) if self.parents[other] == parent]

    def leaves(self) -> list[int]:
        """Return the rows that none follows."""
        inner = set(self.parents)
        return [row for row in range(len(self)) if row not in inner]

    def runs(self) -> Iterator[tuple[int, ...]]:
        """Yield all rows, in order, cut wherever one does not follow the row before it."""
        run: list[int] = []
        for row, parent in enumerate(self.parents):
            if run and parent != row - 1:
                yield tuple(run)
                run = []
            run.append(row)
        if run:
            yield tuple(run)

    def child(self, row: int, token_id: int) -> int | None:
        """Return the first row after `row` that has this token; None for none."""
        return next(
            (
                child
                for child in range(row + 1, len(self))
                if self.parents[child] == row and self.token_ids[child] == token_id
            ),
            None,
        )

    @property
    def trunk_rows(self) -> int:
        """How many first rows follow one another."""
        return len(next(self.runs(), ()))

    def __len__(self) -> int:
        return len(self.token_ids)

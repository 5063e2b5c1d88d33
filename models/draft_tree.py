"""TokenTree: draft tokens that may follow a text, as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TEXT = -1
"""The parent of tokens that follow the text itself."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A tree of tokens, one row each: row i follows row `parents[i]`, which comes before it, or `TEXT`.

    So the first n rows are a tree for every n. Raises `ValueError` where a parent does not come before its
    row.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        fit = len(self.parents) == len(self.token_ids)
        if not fit or not all(TEXT <= parent < row for row, parent in enumerate(self.parents)):
            raise ValueError(f"parents are {self.parents}; each must come before its row")

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> TokenTree:
        """Return the tree in which each token follows the previous one."""
        return cls(tuple(token_ids), tuple(range(TEXT, len(token_ids) - 1)))

    def with_root(self, token_id: int) -> TokenTree:
        """Return this tree behind a token, which becomes row 0."""
        return TokenTree((token_id, *self.token_ids), (TEXT, *(p + 1 for p in self.parents)))

    def of_rows(self, rows: Sequence[int]) -> TokenTree:
        """Return the tree of these rows only, in this order; each row's parent must be among those before it."""
        new_rows = {TEXT: TEXT, **{row: new for new, row in enumerate(rows)}}
        return TokenTree(
            tuple(self.token_ids[row] for row in rows),
            tuple(new_rows[self.parents[row]] for row in rows),
        )

    def trunk_first(self) -> TokenTree:
        """Return the same tree with the rows of a longest path first: the trunk."""
        depths = self.depths()
        trunk = self.path(depths.index(max(depths))) if depths else ()
        return self.of_rows([*trunk, *(row for row in range(len(self)) if row not in trunk)])

    def depths(self) -> list[int]:
        """Return the depth of each row: 0 for those that follow the text."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent == TEXT else depths[parent] + 1)
        return depths

    def path(self, row: int) -> tuple[int, ...]:
        """Return the rows from the text to this one, inclusive."""
        rows = []
        while row != TEXT:
            rows.append(row)
            row = self.parents[row]
        return tuple(reversed(rows))

    def first_path(self) -> tuple[int, ...]:
        """Return the path that follows the first child of each row."""
        rows, last = [], TEXT
        for row, parent in enumerate(self.parents):
            if parent == last:
                rows.append(row)
                last = row
        return tuple(rows)

    def later_siblings(self, row: int) -> list[int]:
        """Return the later rows with the same parent."""
        parent = self.parents[row]
        return [other for other in range(row + 1, len(self)) if self.parents[other] == parent]

    def leaves(self) -> list[int]:
        """Return the rows without children."""
        inner = set(self.parents)
        return [row for row in range(len(self)) if row not in inner]

    def runs(self) -> Iterator[tuple[int, ...]]:
        """Yield all rows in order, split wherever a row does not follow the previous one."""
        run: list[int] = []
        for row, parent in enumerate(self.parents):
            if run and parent != row - 1:
                yield tuple(run)
                run = []
            run.append(row)
        if run:
            yield tuple(run)

    def child(self, row: int, token_id: int) -> int | None:
        """Return the first child of `row` with this token, or None."""
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
        """The length of the trunk: how many of the first rows follow one another."""
        return len(next(self.runs(), ()))

    def __len__(self) -> int:
        return len(self.token_ids)

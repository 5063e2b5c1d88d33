"""Drafts of constrained answers: what the constraint forbids is cut before the pass."""

from __future__ import annotations

from lowtide.models.draft_tree import TokenTree
from lowtide.runtime.structured.answer import ConstrainedAnswer


def legal_part(tree: TokenTree, answer: ConstrainedAnswer) -> TokenTree:
    """Return the rows of a tree that can be accepted: those with no illegal token on their path."""
    rows: set[int] = set()
    for leaf in tree.leaves():
        path = tree.path(leaf)
        rows.update(path[: answer.constraint.num_legal([tree.token_ids[row] for row in path])])
    return tree.of_rows(sorted(rows))

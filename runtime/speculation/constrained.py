"""Drafts of constrained answers: what the constraint forces is drafted, and what it forbids is cut before the pass."""

from __future__ import annotations

from collections.abc import Sequence

from lowtide.models.draft_tree import TokenTree
from lowtide.runtime.speculation.drafts import Draft, Proposal
from lowtide.runtime.structured.answer import ConstrainedAnswer


class ForcedDraft(Draft):
    """Proposes the text that must come next in an answer, such as the names of required properties.

    The model may write the same text with other tokens, so they are verified like those of any draft.
    """

    name = "forced"

    def __init__(self, answer: ConstrainedAnswer) -> None:
        self._answer = answer

    def follow(self, token_ids: Sequence[int]) -> None:
        """Do nothing: the answer itself knows how far it is."""

    def propose(self, num_tokens: int) -> Proposal:
        """Return the forced tokens."""
        return Proposal.chain(tuple(self._answer.constraint.forced())[:num_tokens])

    def prior(self, confidence: int) -> float:
        """Return a high rate: only another way to write the same text is a failure."""
        return 0.95


def legal_part(tree: TokenTree, answer: ConstrainedAnswer) -> TokenTree:
    """Return the rows of a tree that can be accepted: those with no illegal token on their path."""
    rows: set[int] = set()
    for leaf in tree.leaves():
        path = tree.path(leaf)
        rows.update(path[: answer.constraint.num_legal([tree.token_ids[row] for row in path])])
    return tree.of_rows(sorted(rows))

"""Draft: the small interface of what proposes the next tokens. Knows no model that verifies them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lowtide.models.token_tree import TokenTree
from lowtide.models.tokenizer import common_prefix

TAIL = 32
"""Tokens that must agree for a text to be taken for the same one, gone on. Another one with this very end
is followed wrongly: proposals are worse then, and answers the same."""
NOTHING = TokenTree((), ())
MOST_OTHERS = 2
"""Tokens that may stand beside another one."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may come next, and how sure the draft is of them.

    Of the tokens that may come after another one, the likelier stand before the others. `sureness` is a
    class from 0 to the draft's `num_classes` - 1: acceptance is counted for each by itself, so that a draft
    that is right only where it is sure is used only there.
    """

    tree: TokenTree = NOTHING
    sureness: int = 0

    @classmethod
    def chain(cls, token_ids: Sequence[int], sureness: int = 0) -> Proposal:
        """Return what proposes these tokens, one after the other."""
        return cls(TokenTree.chain(token_ids), sureness)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The likeliest tokens, one after the other, without what stands beside them."""
        return tuple(self.tree.token_ids[row] for row in self.tree.first_path())


class Draft(ABC):
    """Proposes tokens after a text that it follows; proposing nothing is always allowed.

    Any token may be wrong: what is proposed is verified, whatever it is.
    """

    name: ClassVar[str]
    num_classes: ClassVar[int] = 1
    is_free: ClassVar[bool] = True
    """Whether proposing takes no time to speak of: it may be done only to count what would be right."""

    @abstractmethod
    def follow(self, token_ids: Sequence[int]) -> None:
        """Be at the end of this text, which goes on from the one before, or is another."""

    @abstractmethod
    def propose(self, num_tokens: int) -> Proposal:
        """Return tokens that may come after the text that is followed, in `num_tokens` places at most.

        At each place there may be others beside a token, up to `MOST_OTHERS` of them.
        """

    def prior(self, sureness: int) -> float:
        """Return the acceptance to believe in for a class before anything is counted: rather too little."""
        return 0.3

    def close(self) -> None:
        """Give back what is held; closing twice is allowed."""
        return None


def num_kept(held: Sequence[int], token_ids: Sequence[int]) -> int:
    """Return how many tokens of the text that is held begin `token_ids`.

    What only goes on is recognised by its end: comparing all of it at each token would add up.
    """
    length = len(held)
    if length <= len(token_ids) and list(held[-TAIL:]) == list(
        token_ids[max(length - TAIL, 0) : length]
    ):
        return length
    return common_prefix(held, token_ids)

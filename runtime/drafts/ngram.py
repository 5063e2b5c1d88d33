"""NgramDraft: prompt lookup. What followed the same tokens earlier in the text may follow them again.

The longest match is taken, and of equally long ones the most recent. Learns nothing beyond the text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from lowtide.models.token_tree import TEXT, TokenTree
from lowtide.runtime.drafts.draft import MOST_OTHERS, Draft, Proposal, num_kept

LEAST_MATCH = 3
MOST_MATCH = 32
"""Tokens that have to agree, and how many are compared: longer matches are not told apart."""
MOST_CANDIDATES = 32
"""Earlier places that are looked at for each proposal."""
CLASSES = (4, 6, 8, 12, 20)
"""Matches shorter than these fall into classes 0, 1, ...: a longer one is right more often."""
PRIORS = (0.4, 0.55, 0.7, 0.8, 0.9, 0.95)
"""What is believed of each class at first: a little less than transcripts of chats showed."""
NUM_HEADS = 1 << 12


class NgramDraft(Draft):
    """Looks the text's end up in the text itself, prompt and output.

    Places are chained by a hash of the `LEAST_MATCH` tokens that end there, each to the one before it, so
    that a text can also be taken back from its end. Holds eight bytes a token.
    """

    name = "ngram"
    num_classes = len(CLASSES) + 1

    def __init__(self) -> None:
        self._text = array("i")
        self._earlier = array("i")
        """For each place the one before it with the same hash; -1 where there is none."""
        self._heads = array("i", [-1]) * NUM_HEADS

    def follow(self, token_ids: Sequence[int]) -> None:
        """Take back what the text has not any more, and chain what is new of it."""
        kept = num_kept(self._text, token_ids)
        while len(self._text) > kept:
            self._heads[self._hash()] = self._earlier.pop()
            self._text.pop()
        for token_id in token_ids[kept:]:
            self._text.append(token_id)
            head = self._hash()
            self._earlier.append(self._heads[head])
            self._heads[head] = len(self._text) - 1

    def propose(self, num_tokens: int) -> Proposal:
        """Return what followed the longest match of at least `LEAST_MATCH` tokens.

        Beside it stands what followed shorter ones, where that began otherwise.
        """
        if num_tokens < 1 or len(self._text) <= LEAST_MATCH:
            return Proposal()
        matches = self._matches()
        if not matches:
            return Proposal()
        longest, best = matches[0]
        sureness = sum(longest >= least for least in CLASSES)
        if longest >= MOST_MATCH:
            return Proposal.chain(self._copied(best, num_tokens), sureness)
        return Proposal(self._branched([place for _, place in matches], num_tokens), sureness)

    def _matches(self) -> list[tuple[int, int]]:
        """Return earlier places that match the text's end, and how long, the best first.

        None is looked for behind one that is as long as can be.
        """
        matches: list[tuple[int, int]] = []
        place = self._earlier[-1]
        for _ in range(MOST_CANDIDATES):
            if place < 0:
                break
            length = self._match(place)
            if length >= LEAST_MATCH:
                matches.append((length, place))
            if length >= MOST_MATCH:
                break
            place = self._earlier[place]
        return sorted(matches, reverse=True)

    def _branched(self, places: Sequence[int], num_tokens: int) -> TokenTree:
        """What follows each place, one copy beside the other, those alone that begin with a new token."""
        token_ids, parents, begun = list[int](), list[int](), set[int]()
        for place in places:
            copied = self._copied(place, num_tokens)
            if copied[0] in begun:
                continue
            begun.add(copied[0])
            parents += [TEXT, *range(len(token_ids), len(token_ids) + len(copied) - 1)]
            token_ids += copied
            if len(begun) > MOST_OTHERS:
                break
        return TokenTree(tuple(token_ids), tuple(parents))

    def prior(self, sureness: int) -> float:
        """Return more for longer matches."""
        return PRIORS[sureness]

    def _copied(self, place: int, num_tokens: int) -> tuple[int, ...]:
        """What follows a place; where it reaches the text's end it repeats, as the text would."""
        following = self._text[place + 1 : place + 1 + num_tokens]
        repeats = -(-num_tokens // len(following))
        return tuple((following * repeats)[:num_tokens])

    def _match(self, place: int) -> int:
        """Return how many tokens before and at the place equal the text's last ones."""
        text, last = self._text, len(self._text) - 1
        most = min(MOST_MATCH, place + 1)
        return next((n for n in range(most) if text[place - n] != text[last - n]), most)

    def _hash(self) -> int:
        """Return the chain of the text's last place."""
        value = 0
        for token_id in self._text[-LEAST_MATCH:]:
            value = (value * 0x9E3779B1 + token_id + 1) & 0xFFFFFFFF
        return value >> 20

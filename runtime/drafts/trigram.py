"""TrigramDraft: a table of which token follows which two, learned from the conversation as it goes.

ADED's adaptive table without its corpus: it begins empty, is bounded, and outlives the text. What was
learned in one turn is proposed in the next, also where that is another conversation.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from lowtide.models.token_tree import TEXT, TokenTree
from lowtide.runtime.drafts.draft import MOST_OTHERS, Draft, Proposal, num_kept

NUM_KEYS = 1 << 14
"""Pairs of tokens that the table has room for; a pair takes the place of one that fell behind."""
NUM_FOLLOWERS = 4
"""Tokens that are kept for each pair."""
MOST_WEIGHT = 64
"""A follower's weight grows by one each time that it is seen, up to this."""
LEAST_SHARE = 0.4
"""A chain ends at a pair whose likeliest follower has less of the weight."""
CLASSES = (0.6, 0.8, 0.95)
"""Shares of a chain's first follower that part the classes."""
ENTRY_BYTES = 8 + NUM_FOLLOWERS * 5
TABLE_BYTES = NUM_KEYS * ENTRY_BYTES


class TrigramDraft(Draft):
    """Proposes the likeliest follower of the last two tokens, then of those two, and so on."""

    name = "trigram"
    num_classes = 2 * (len(CLASSES) + 1)

    def __init__(self) -> None:
        self._keys = array("q", [-1]) * NUM_KEYS
        self._followers = array("i", [-1]) * (NUM_KEYS * NUM_FOLLOWERS)
        self._weights = array("B", [0]) * (NUM_KEYS * NUM_FOLLOWERS)
        self._text = array("i")

    def follow(self, token_ids: Sequence[int]) -> None:
        """Learn from what is new of the text; what it has not any more stays learned."""
        text = self._text
        kept = num_kept(text, token_ids)
        del text[kept:]
        text.extend(token_ids[kept:])
        for at in range(max(kept, 2), len(text)):
            self._learn(text[at - 2], text[at - 1], text[at])

    def propose(self, num_tokens: int) -> Proposal:
        """Return the chain of likeliest followers, and beside each the next likeliest ones."""
        if len(self._text) < 2:
            return Proposal()
        left, right = self._text[-2:]
        token_ids, parents = list[int](), list[int]()
        sureness, last = 0, TEXT
        for _ in range(num_tokens):
            followers = self._followers_of(left, right)
            if not followers:
                break
            weight, likeliest = followers[0]
            share = weight / sum(weight for weight, _ in followers)
            if share < LEAST_SHARE:
                break
            if last == TEXT:
                sureness = 2 * sum(share >= least for least in CLASSES) + (weight > 1)
            taken = followers[: MOST_OTHERS + 1]
            parents += [last] * len(taken)
            last = len(token_ids)
            token_ids += (token_id for _, token_id in taken)
            left, right = right, likeliest
        return Proposal(TokenTree(tuple(token_ids), tuple(parents)), sureness)

    def _followers_of(self, left: int, right: int) -> list[tuple[int, int]]:
        """Return the weights of a pair's followers and those, the likeliest first."""
        slot, key = _slot(left, right)
        if self._keys[slot] != key:
            return []
        first = slot * NUM_FOLLOWERS
        places = range(first, first + NUM_FOLLOWERS)
        found = [(self._weights[p], self._followers[p]) for p in places if self._weights[p]]
        return sorted(found, key=lambda one: -one[0])

    def _learn(self, left: int, right: int, token_id: int) -> None:
        slot, key = _slot(left, right)
        weights, followers = self._weights, self._followers
        first = slot * NUM_FOLLOWERS
        places = range(first, first + NUM_FOLLOWERS)
        if self._keys[slot] != key:
            if not self._gives_way(places):
                return
            self._keys[slot] = key
        for place in places:
            if followers[place] == token_id and weights[place]:
                break
        else:
            place = min(places, key=weights.__getitem__)
            followers[place], weights[place] = token_id, 0
        if weights[place] == MOST_WEIGHT:
            for other in places:
                weights[other] //= 2
        weights[place] += 1

    def _gives_way(self, places: range) -> bool:
        """Halve what another pair has learned in a slot that is wanted; it is empty at last."""
        weights = self._weights
        if not any(weights[places.start : places.stop]):
            return True
        for place in places:
            weights[place] //= 2
        return not any(weights[places.start : places.stop])


def _slot(left: int, right: int) -> tuple[int, int]:
    key = left << 32 | right
    return (left * 0x9E3779B1 + right * 0x85EBCA6B & 0xFFFFFFFF) >> 18, key

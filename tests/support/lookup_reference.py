"""Prompt lookup and the table of followers in plain Python: the oracle of the native ones."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from lowtide.models.draft_tree import TEXT, TokenTree
from lowtide.runtime.speculation.drafts import CLASSES, MAX_SIBLINGS, Proposal, num_common

MIN_MATCH = 3
MAX_MATCH = 32
"""Tokens that must agree, and the most that are compared: longer matches count as equally long."""
MAX_CANDIDATES = 32
"""Earlier positions that are compared for each proposal."""
NUM_HEADS = 1 << 12


class NgramReference:
    """Looks up the end of the text in the text itself, prompt and output (prompt lookup decoding).

    The longest match is proposed, and of equally long ones the most recent. Positions are chained by a hash of the
    `MIN_MATCH` tokens that end there, each to the one before it, so that a text can also be shortened. Takes 8
    bytes a token.
    """

    def __init__(self) -> None:
        self._text = array("i")
        self._earlier = array("i")
        """For each position the one before it with the same hash; -1 for none."""
        self._heads = array("i", [-1]) * NUM_HEADS

    def follow(self, token_ids: Sequence[int]) -> None:
        """Remove positions that are not in the new text, and chain its new ones."""
        common = num_common(self._text, token_ids)
        while len(self._text) > common:
            self._heads[self._hash()] = self._earlier.pop()
            self._text.pop()
        for token_id in token_ids[common:]:
            self._text.append(token_id)
            head = self._hash()
            self._earlier.append(self._heads[head])
            self._heads[head] = len(self._text) - 1

    def propose(self, num_tokens: int) -> Proposal:
        """Return what followed the longest match of at least `MIN_MATCH` tokens.

        What followed shorter matches, where it began with another token, is added as branches.
        """
        if num_tokens < 1 or len(self._text) <= MIN_MATCH:
            return Proposal()
        matches = self._matches()
        if not matches:
            return Proposal()
        longest, best = matches[0]
        confidence = sum(longest >= least for least in CLASSES)
        if longest >= MAX_MATCH:
            return Proposal.chain(self._following(best, num_tokens), confidence)
        return Proposal(
            self._branches([position for _, position in matches], num_tokens), confidence
        )

    def _matches(self) -> list[tuple[int, int]]:
        """Return pairs of match length and earlier position, the best first; stops at a match of full length."""
        matches: list[tuple[int, int]] = []
        position = self._earlier[-1]
        for _ in range(MAX_CANDIDATES):
            if position < 0:
                break
            length = self._match(position)
            if length >= MIN_MATCH:
                matches.append((length, position))
            if length >= MAX_MATCH:
                break
            position = self._earlier[position]
        return sorted(matches, reverse=True)

    def _branches(self, positions: Sequence[int], num_tokens: int) -> TokenTree:
        """Return what follows each position as branches that begin with different tokens."""
        token_ids, parents, begun = list[int](), list[int](), set[int]()
        for position in positions:
            following = self._following(position, num_tokens)
            if following[0] in begun:
                continue
            begun.add(following[0])
            parents += [TEXT, *range(len(token_ids), len(token_ids) + len(following) - 1)]
            token_ids += following
            if len(begun) > MAX_SIBLINGS:
                break
        return TokenTree(tuple(token_ids), tuple(parents))

    def _following(self, position: int, num_tokens: int) -> tuple[int, ...]:
        """Return what follows a position; at the end of the text it repeats, as the text would."""
        following = self._text[position + 1 : position + 1 + num_tokens]
        repeats = -(-num_tokens // len(following))
        return tuple((following * repeats)[:num_tokens])

    def _match(self, position: int) -> int:
        """Return how many tokens up to this position equal the last ones of the text."""
        text, last = self._text, len(self._text) - 1
        most = min(MAX_MATCH, position + 1)
        return next((n for n in range(most) if text[position - n] != text[last - n]), most)

    def _hash(self) -> int:
        """Return the hash of the last tokens."""
        value = 0
        for token_id in self._text[-MIN_MATCH:]:
            value = (value * 0x9E3779B1 + token_id + 1) & 0xFFFFFFFF
        return value >> 20


NUM_KEYS = 1 << 14
"""Token pairs that the table has room for; a pair replaces one that is seen less often."""
NUM_FOLLOWERS = 4
"""Followers that are stored for each pair."""
MAX_WEIGHT = 64
"""Largest count of a follower; all counts of the pair are halved then."""
MIN_SHARE = 0.4
"""A chain ends at a pair whose most frequent follower has less than this share of the counts."""
TRIGRAM_CLASSES = (0.6, 0.8, 0.95)
"""Shares of the first follower that separate the confidence classes."""


class TrigramReference:
    """Proposes the most frequent follower of the last two tokens, then of the next two, and so on.

    ADED's adaptive table without its corpus: it begins empty, has a fixed size, and outlives the text. What was
    learned in one turn is proposed in the next one, also in another chat.
    """

    def __init__(self) -> None:
        self._keys = array("q", [-1]) * NUM_KEYS
        self._followers = array("i", [-1]) * (NUM_KEYS * NUM_FOLLOWERS)
        self._weights = array("B", [0]) * (NUM_KEYS * NUM_FOLLOWERS)
        self._text = array("i")

    def follow(self, token_ids: Sequence[int]) -> None:
        """Learn from the new tokens of the text; what was learned of removed ones stays."""
        text = self._text
        common = num_common(text, token_ids)
        del text[common:]
        text.extend(token_ids[common:])
        for at in range(max(common, 2), len(text)):
            self._learn(text[at - 2], text[at - 1], text[at])

    def propose(self, num_tokens: int) -> Proposal:
        """Return the chain of most frequent followers, each with the next most frequent ones as siblings."""
        if len(self._text) < 2:
            return Proposal()
        left, right = self._text[-2:]
        token_ids, parents = list[int](), list[int]()
        confidence, last = 0, TEXT
        for _ in range(num_tokens):
            followers = self._followers_of(left, right)
            if not followers:
                break
            weight, most_probable = followers[0]
            share = weight / sum(weight for weight, _ in followers)
            if share < MIN_SHARE:
                break
            if last == TEXT:
                confidence = 2 * sum(share >= least for least in TRIGRAM_CLASSES) + (weight > 1)
            taken = followers[: MAX_SIBLINGS + 1]
            parents += [last] * len(taken)
            last = len(token_ids)
            token_ids += (token_id for _, token_id in taken)
            left, right = right, most_probable
        return Proposal(TokenTree(tuple(token_ids), tuple(parents)), confidence)

    def _followers_of(self, left: int, right: int) -> list[tuple[int, int]]:
        """Return a pair's followers as (count, token), the most frequent first."""
        slot, key = _slot(left, right)
        if self._keys[slot] != key:
            return []
        first = slot * NUM_FOLLOWERS
        positions = range(first, first + NUM_FOLLOWERS)
        found = [(self._weights[p], self._followers[p]) for p in positions if self._weights[p]]
        return sorted(found, key=lambda one: -one[0])

    def _learn(self, left: int, right: int, token_id: int) -> None:
        slot, key = _slot(left, right)
        weights, followers = self._weights, self._followers
        first = slot * NUM_FOLLOWERS
        positions = range(first, first + NUM_FOLLOWERS)
        if self._keys[slot] != key:
            if not self._evict(positions):
                return
            self._keys[slot] = key
        for position in positions:
            if followers[position] == token_id and weights[position]:
                break
        else:
            position = min(positions, key=weights.__getitem__)
            followers[position], weights[position] = token_id, 0
        if weights[position] == MAX_WEIGHT:
            for other in positions:
                weights[other] //= 2
        weights[position] += 1

    def _evict(self, positions: range) -> bool:
        """Halve the counts of another pair in the same slot; return whether it is empty now."""
        weights = self._weights
        if not any(weights[positions.start : positions.stop]):
            return True
        for position in positions:
            weights[position] //= 2
        return not any(weights[positions.start : positions.stop])


def _slot(left: int, right: int) -> tuple[int, int]:
    key = left << 32 | right
    return (left * 0x9E3779B1 + right * 0x85EBCA6B & 0xFFFFFFFF) >> 18, key

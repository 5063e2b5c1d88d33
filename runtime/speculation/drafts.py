"""Drafts: what proposes the next tokens, to be verified by the model.

* `NgramDraft`: prompt lookup, the tokens that followed the same tokens earlier in the text;
* `TrigramDraft`: a table of which token follows which two, learned as the chat goes on;
* `ModelDraft`: a smaller model of the same vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lowtide.models.draft_tree import TEXT, TokenTree
from lowtide.models.errors import BadOption, ForwardError
from lowtide.models.model import Model
from lowtide.models.tokenizer import Tokenizer, common_prefix

TAIL = 32
"""Tokens at the end of a text that must agree for a new text to count as its continuation. Where another text has the
same end, proposals are worse; answers stay the same."""
NOTHING = TokenTree((), ())
MAX_SIBLINGS = 2
"""Alternatives that may be proposed beside a token."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A tree of tokens that may come next, and the draft's confidence in it.

    Of the children of a token, the more probable come first. `confidence` is a class from 0 to the draft's
    `num_classes` - 1. Acceptance is counted by class, so a draft that is right only when it is confident is used
    only then.
    """

    tree: TokenTree = NOTHING
    confidence: int = 0

    @classmethod
    def chain(cls, token_ids: Sequence[int], confidence: int = 0) -> Proposal:
        """Return a proposal of these tokens, one after the other."""
        return cls(TokenTree.chain(token_ids), confidence)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The most probable tokens, one after the other, without their siblings."""
        return tuple(self.tree.token_ids[row] for row in self.tree.first_path())


class Draft(ABC):
    """Proposes tokens after a text. Proposing nothing is always allowed, and any token may be wrong."""

    name: ClassVar[str]
    num_classes: ClassVar[int] = 1
    is_free: ClassVar[bool] = True
    """Whether proposing takes next to no time, so that it may be done only to count acceptance."""

    @abstractmethod
    def follow(self, token_ids: Sequence[int]) -> None:
        """Move to the end of this text, which continues the one before or is another one."""

    @abstractmethod
    def propose(self, num_tokens: int) -> Proposal:
        """Return tokens that may follow the text, at most `num_tokens` deep.

        Each token may have up to `MAX_SIBLINGS` siblings.
        """

    def prior(self, confidence: int) -> float:
        """Return the acceptance rate of a class before anything is counted; deliberately low."""
        return 0.3

    def close(self) -> None:
        """Free what the draft holds. Closing twice is allowed."""
        return None


def num_common(held: Sequence[int], token_ids: Sequence[int]) -> int:
    """Return the length of the common prefix of the held text and `token_ids`.

    A continuation is recognised by its last tokens: comparing whole texts at each token would add up.
    """
    length = len(held)
    if length <= len(token_ids) and list(held[-TAIL:]) == list(
        token_ids[max(length - TAIL, 0) : length]
    ):
        return length
    return common_prefix(held, token_ids)


MIN_MATCH = 3
MAX_MATCH = 32
"""Tokens that must agree, and the most that are compared: longer matches count as equally long."""
MAX_CANDIDATES = 32
"""Earlier positions that are compared for each proposal."""
CLASSES = (4, 6, 8, 12, 20)
"""Confidence classes 0, 1, ... are matches shorter than these: a longer match is right more often."""
PRIORS = (0.4, 0.55, 0.7, 0.8, 0.9, 0.95)
"""Prior acceptance of each class: a little below what transcripts of chats showed."""
NUM_HEADS = 1 << 12


class NgramDraft(Draft):
    """Looks up the end of the text in the text itself, prompt and output (prompt lookup decoding).

    The longest match is proposed, and of equally long ones the most recent. Positions are chained by a hash of the
    `MIN_MATCH` tokens that end there, each to the one before it, so that a text can also be shortened. Takes 8
    bytes a token.
    """

    name = "ngram"
    num_classes = len(CLASSES) + 1

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

    def prior(self, confidence: int) -> float:
        """Return a higher rate for longer matches."""
        return PRIORS[confidence]

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
ENTRY_BYTES = 8 + NUM_FOLLOWERS * 5
TABLE_BYTES = NUM_KEYS * ENTRY_BYTES


class TrigramDraft(Draft):
    """Proposes the most frequent follower of the last two tokens, then of the next two, and so on.

    ADED's adaptive table without its corpus: it begins empty, has a fixed size, and outlives the text. What was
    learned in one turn is proposed in the next one, also in another chat.
    """

    name = "trigram"
    num_classes = 2 * (len(TRIGRAM_CLASSES) + 1)

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


COMPARED_TOKENS = 2048
"""Tokens whose texts are compared, spread over the vocabulary."""


class ModelDraft(Draft):
    """Proposes a smaller model's greedy continuation, with its second most probable token as a sibling of each.

    It owns the model. The model's KV cache follows the text, so only new tokens are computed. A text longer than
    the model's context gets no proposal.
    """

    name = "model"
    is_free = False

    def __init__(self, model: Model) -> None:
        self._model = model
        self._text: Sequence[int] = ()
        self._cached: list[int] = []

    def follow(self, token_ids: Sequence[int]) -> None:
        """Remember the text; it is computed when a proposal is asked for."""
        self._text = token_ids

    def propose(self, num_tokens: int) -> Proposal:
        """Return the most probable tokens, one after the other, up to the end-of-text token."""
        if not self._text or len(self._text) + num_tokens > self._model.context:
            return Proposal()
        token_ids, parents, last = list[int](), list[int](), TEXT
        most_probable = self._read()
        for position in range(num_tokens):
            if self._model.tokenizer.is_end(most_probable[0]):
                break
            parents += (last, last)
            last = len(token_ids)
            token_ids += most_probable
            if position + 1 < num_tokens:
                most_probable = self._forward((most_probable[0],))
        return Proposal(TokenTree(tuple(token_ids), tuple(parents)))

    def _read(self) -> tuple[int, int]:
        """Compute what the cache lacks of the text, and return the two most probable tokens after it."""
        # At least the last token is computed: its logits are needed.
        common = min(num_common(self._cached, self._text), len(self._text) - 1)
        del self._cached[self._model.truncate(common) :]
        most_probable = 0, 0
        for start in range(len(self._cached), len(self._text), self._model.batch_size):
            most_probable = self._forward(self._text[start : start + self._model.batch_size])
        return most_probable

    def _forward(self, token_ids: Sequence[int]) -> tuple[int, int]:
        try:
            logits = self._model.forward(token_ids)
        except ForwardError:
            self._model.truncate(0)
            self._cached.clear()
            raise
        self._cached.extend(token_ids)
        first = int(logits.argmax())
        logits[first] = -float(
            "inf"
        )  # the array is a view that belongs to the caller until the next pass
        return first, int(logits.argmax())

    def close(self) -> None:
        """Free the model."""
        self._model.close()


def require_same_tokens(draft: Tokenizer, target: Tokenizer, num_tokens: int, name: str) -> None:
    """Raise `BadOption` where a token has different texts in the two vocabularies."""
    step = max(num_tokens // COMPARED_TOKENS, 1)
    for token_id in range(0, num_tokens, step):
        expected, found = target.token_bytes(token_id), draft.token_bytes(token_id)
        if expected != found:
            raise BadOption(
                f"the draft model {name} has another vocabulary: its token {token_id} is {found!r}, the "
                f"model's is {expected!r}; use a smaller model of the same family"
            )

"""Draft: the small interface of what proposes the next tokens. Knows no model that verifies them.

NgramDraft: prompt lookup. What followed the same tokens earlier in the text may follow them again.

The longest match is taken, and of equally long ones the most recent. Learns nothing beyond the text.

TrigramDraft: a table of which token follows which two, learned from the conversation as it goes.

ADED's adaptive table without its corpus: it begins empty, is bounded, and outlives the text. What was
learned in one turn is proposed in the next, also where that is another conversation.

ModelDraft: a smaller model of the same vocabulary that says what it would say. Knows no target."""

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
"""Tokens that must agree for a text to be taken for the same one, gone on. Another one with this very end
is followed wrongly: proposals are worse then, and answers the same."""
NOTHING = TokenTree((), ())
MOST_OTHERS = 2
"""Tokens that may stand beside another one."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may come next, and how sure the draft is of them.

    Of the tokens that may come after another one, the likelier stand before the others. `confidence` is a
    class from 0 to the draft's `num_classes` - 1: acceptance is counted for each by itself, so that a draft
    that is right only where it is sure is used only there.
    """

    tree: TokenTree = NOTHING
    confidence: int = 0

    @classmethod
    def chain(cls, token_ids: Sequence[int], confidence: int = 0) -> Proposal:
        """Return what proposes these tokens, one after the other."""
        return cls(TokenTree.chain(token_ids), confidence)

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

    def prior(self, confidence: int) -> float:
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
        confidence = sum(longest >= least for least in CLASSES)
        if longest >= MOST_MATCH:
            return Proposal.chain(self._copied(best, num_tokens), confidence)
        return Proposal(self._branched([place for _, place in matches], num_tokens), confidence)

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

    def prior(self, confidence: int) -> float:
        """Return more for longer matches."""
        return PRIORS[confidence]

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


NUM_KEYS = 1 << 14
"""Pairs of tokens that the table has room for; a pair takes the place of one that fell behind."""
NUM_FOLLOWERS = 4
"""Tokens that are kept for each pair."""
MOST_WEIGHT = 64
"""A follower's weight grows by one each time that it is seen, up to this."""
LEAST_SHARE = 0.4
"""A chain ends at a pair whose likeliest follower has less of the weight."""
TRIGRAM_CLASSES = (0.6, 0.8, 0.95)
"""Shares of a chain's first follower that part the classes."""
ENTRY_BYTES = 8 + NUM_FOLLOWERS * 5
TABLE_BYTES = NUM_KEYS * ENTRY_BYTES


class TrigramDraft(Draft):
    """Proposes the likeliest follower of the last two tokens, then of those two, and so on."""

    name = "trigram"
    num_classes = 2 * (len(TRIGRAM_CLASSES) + 1)

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
        confidence, last = 0, TEXT
        for _ in range(num_tokens):
            followers = self._followers_of(left, right)
            if not followers:
                break
            weight, likeliest = followers[0]
            share = weight / sum(weight for weight, _ in followers)
            if share < LEAST_SHARE:
                break
            if last == TEXT:
                confidence = 2 * sum(share >= least for least in TRIGRAM_CLASSES) + (weight > 1)
            taken = followers[: MOST_OTHERS + 1]
            parents += [last] * len(taken)
            last = len(token_ids)
            token_ids += (token_id for _, token_id in taken)
            left, right = right, likeliest
        return Proposal(TokenTree(tuple(token_ids), tuple(parents)), confidence)

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


COMPARED_TOKENS = 2048
"""Tokens whose texts are compared, from the vocabulary's beginning to its end."""


class ModelDraft(Draft):
    """Proposes the model's greedy continuation, and beside each token the one that it would say next to it.

    It owns the model, and closes it.

    Its cache follows the text: only what is new of it is read. A text that is longer than its context gets
    no proposal.
    """

    name = "model"
    is_free = False

    def __init__(self, model: Model) -> None:
        self._model = model
        self._wanted: Sequence[int] = ()
        self._held: list[int] = []

    def follow(self, token_ids: Sequence[int]) -> None:
        """Remember the text; it is read when something is to be proposed."""
        self._wanted = token_ids

    def propose(self, num_tokens: int) -> Proposal:
        """Return the likeliest tokens, one after the other, up to the one that would end the answer."""
        if not self._wanted or len(self._wanted) + num_tokens > self._model.context:
            return Proposal()
        token_ids, parents, last = list[int](), list[int](), TEXT
        likeliest = self._read()
        for place in range(num_tokens):
            if self._model.tokenizer.is_end(likeliest[0]):
                break
            parents += (last, last)
            last = len(token_ids)
            token_ids += likeliest
            if place + 1 < num_tokens:
                likeliest = self._forward((likeliest[0],))
        return Proposal(TokenTree(tuple(token_ids), tuple(parents)))

    def _read(self) -> tuple[int, int]:
        """Read what the cache has not of the text, and return the two likeliest tokens after it."""
        # The last token is read again where all of them are held: its logits are wanted.
        kept = min(num_kept(self._held, self._wanted), len(self._wanted) - 1)
        del self._held[self._model.truncate(kept) :]
        likeliest = 0, 0
        for start in range(len(self._held), len(self._wanted), self._model.batch_size):
            likeliest = self._forward(self._wanted[start : start + self._model.batch_size])
        return likeliest

    def _forward(self, token_ids: Sequence[int]) -> tuple[int, int]:
        try:
            logits = self._model.forward(token_ids)
        except ForwardError:
            self._model.truncate(0)
            self._held.clear()
            raise
        self._held.extend(token_ids)
        first = int(logits.argmax())
        logits[first] = -float("inf")  # they are ours until the next call
        return first, int(logits.argmax())

    def close(self) -> None:
        """Free the model."""
        self._model.close()


def require_same_tokens(draft: Tokenizer, target: Tokenizer, num_tokens: int, name: str) -> None:
    """Raise `BadOption` where tokens of the two vocabularies are different texts."""
    step = max(num_tokens // COMPARED_TOKENS, 1)
    for token_id in range(0, num_tokens, step):
        ours, theirs = target.token_bytes(token_id), draft.token_bytes(token_id)
        if ours != theirs:
            raise BadOption(
                f"the draft {name} has another vocabulary: its token {token_id} is {theirs!r}, the "
                f"model's {ours!r}; pick a smaller model of the same family"
            )

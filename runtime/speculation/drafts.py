"""Drafts: what proposes the next tokens, to be verified by the model.

* `NgramDraft`: prompt lookup, the tokens that followed the same tokens earlier in the text;
* `TrigramDraft`: a table of which token follows which two, learned as the chat goes on;
* `ModelDraft`: a smaller model of the same vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lowtide.attention.bindings.lookup import LookupKind, LookupTable
from lowtide.models.draft_tree import TEXT, TokenTree
from lowtide.models.errors import BadOption, ForwardError
from lowtide.models.model import Model
from lowtide.models.text.tokenizer import Tokenizer, common_prefix

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


NO_PROPOSAL = Proposal()


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


CLASSES = (4, 6, 8, 12, 20)
"""Confidence classes 0, 1, ... are matches shorter than these: a longer match is right more often."""
PRIORS = (0.4, 0.55, 0.7, 0.8, 0.9, 0.95)
"""Prior acceptance of each class: a little below what transcripts of chats showed."""
SHARE_CLASSES = (0.6, 0.8, 0.95)
"""Shares of the first follower that separate the confidence classes of the table."""


class LookupDraft(Draft):
    """A draft of the native library, which takes a few microseconds a token."""

    kind: ClassVar[LookupKind]

    def __init__(self) -> None:
        self._table = LookupTable(self.kind)

    def follow(self, token_ids: Sequence[int]) -> None:
        """Move to the end of the text; only what is new of it is read."""
        self._table.follow(token_ids)

    def propose(self, num_tokens: int) -> Proposal:
        """Return what the native library proposes."""
        found = self._table.propose(num_tokens)
        if found is None:
            return NO_PROPOSAL
        token_ids, parents, confidence = found
        return Proposal(TokenTree(token_ids, parents), confidence)

    @property
    def num_bytes(self) -> int:
        """The bytes that the tables hold."""
        return self._table.num_bytes

    def close(self) -> None:
        """Free the tables."""
        self._table.close()


class NgramDraft(LookupDraft):
    """Looks up the end of the text in the text itself, prompt and output (prompt lookup decoding).

    The longest match of at least three tokens is proposed, and of equally long ones the most recent. What followed
    shorter matches, where it began with another token, is added as branches.
    """

    name = "ngram"
    kind = "ngram"
    num_classes = len(CLASSES) + 1

    def prior(self, confidence: int) -> float:
        """Return a higher rate for longer matches."""
        return PRIORS[confidence]


class TrigramDraft(LookupDraft):
    """Proposes the most frequent follower of the last two tokens, then of the next two, and so on.

    ADED's adaptive table without its corpus: it begins empty, has a fixed size, and outlives the text. What was
    learned in one turn is proposed in the next one, also in another chat.
    """

    name = "trigram"
    kind = "trigram"
    num_classes = 2 * (len(SHARE_CLASSES) + 1)


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

"""ModelDraft: a smaller model of the same vocabulary that says what it would say. Knows no target."""

from __future__ import annotations

from collections.abc import Sequence

from lowtide.models.errors import BadOption, ForwardError
from lowtide.models.model import Model
from lowtide.models.token_tree import TEXT, TokenTree
from lowtide.models.tokenizer import Tokenizer
from lowtide.runtime.drafts.draft import Draft, Proposal, num_kept

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
        for start in range(len(self._held), len(self._wanted), self._model.max_rows):
            likeliest = self._forward(self._wanted[start : start + self._model.max_rows])
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

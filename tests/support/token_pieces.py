"""A tokenizer of bytes and a few longer tokens, and random answers under a constraint without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lowtide.models.text.tokenizer import Tokenizer
from lowtide.runtime.structured.answer import ConstrainedAnswer
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.vocabulary import TokenVocabulary

END = 256


class PieceTokenizer(Tokenizer):
    """Tokens 0 to 255 are bytes, 256 ends a text, the next ones are `pieces`, the others control tokens."""

    def __init__(self, pieces: Sequence[str | bytes]) -> None:
        self._pieces = [one.encode() if isinstance(one, str) else one for one in pieces]

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the longest pieces from the left, else bytes."""
        data, found = text.encode(), list[int]()
        by_length = sorted(range(len(self._pieces)), key=lambda i: -len(self._pieces[i]))
        while data:
            number = next((i for i in by_length if data.startswith(self._pieces[i])), None)
            found.append(data[0] if number is None else END + 1 + number)
            data = data[1 if number is None else len(self._pieces[number]) :]
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token."""
        if token_id < END:
            return bytes([token_id])
        number = token_id - END - 1
        return self._pieces[number] if 0 <= number < len(self._pieces) else b""

    def is_end(self, token_id: int) -> bool:
        """Whether the token ends a text."""
        return token_id == END

    @property
    def special_texts(self) -> dict[str, str]:
        """There are none."""
        return {}


def random_answer(
    constraint: Constraint,
    vocabulary: TokenVocabulary,
    chooser: random.Random,
    *,
    likely: bytes = b"",
    max_tokens: int = 40,
) -> str:
    """Return a random answer of at most `max_tokens` tokens, closed as the decode loop closes it.

    Longer tokens and those of the bytes `likely` come more often.
    """
    answer = ConstrainedAnswer(constraint.fork(), vocabulary.end_ids, max_tokens)
    written: list[int] = []
    while True:
        if answer.is_done or len(written) == max_tokens:
            break
        legal = answer.legal_ids().tolist()
        better = [one for one in legal if one >= END or one in likely]
        token_id = chooser.choice(better if better and chooser.random() < 0.9 else legal)
        if token_id in vocabulary.end_ids:
            break
        if answer.take(token_id):
            written.append(token_id)
        elif answer.is_closed:
            break
    written += answer.close()
    assert answer.constraint.is_accepting and len(written) <= max_tokens
    return vocabulary.decode(written).decode("utf-8", errors="replace")

"""TextCuts: where a long text is cut before llama.cpp tokenises it, because the whole would take quadratic time.

Two parts of llama.cpp's tokenizers take time by the square of the text. A pre-tokenizer that groups digits from their
end looks to the end of the number at each digit. SentencePiece's search copies all tokens at each character that has
no token of its own. A cut never changes the tokens: it is made only where no token can reach over it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

SENTENCE_PIECE, BYTE_PAIRS = 1, 2
"""llama_vocab_type."""
DIGITS_PER_GROUP = 3
LONG_NUMBER, NUMBER_PIECE = 150, 75
"""Digits of a number that is cut, and of each piece (a multiple of `DIGITS_PER_GROUP`)."""
LONG_TEXT, TEXT_PIECE = 32 << 10, 8 << 10
"""Bytes of a text that is cut for SentencePiece, and the least characters of a piece."""
MAX_CUT_CHARACTERS = 256
"""How many different characters, the most frequent ones, a text may be cut before."""
BLANK = "▁"
_NUMBER = re.compile(rb"[0-9]{%d,}" % LONG_NUMBER)
_DIGITS = re.compile(rb"[0-9]{2,}")

Encode = Callable[[bytes], list[int]]


class TextCuts:
    """The cuts for one vocabulary of llama.cpp's type `kind`.

    `encode` tokenises text without control tokens, and `texts` yields the texts of all tokens.
    """

    def __init__(self, kind: int, encode: Encode, texts: Callable[[], Iterator[bytes]]) -> None:
        self._kind, self._encode, self._texts = kind, encode, texts
        self._groups_digits: bool | None = None
        self._merges: dict[str, bool] = {}

    def encode(self, data: bytes) -> list[int]:
        """Return the tokens of `data`, UTF-8, as `encode` would."""
        if self._kind == BYTE_PAIRS:
            return self._joined(self._cut(data, self._number_cuts(data)))
        if self._kind == SENTENCE_PIECE and len(data) >= LONG_TEXT:
            return self._encode_sentence_pieces(data)
        return self._encode(data)

    def _joined(self, pieces: Sequence[bytes], num_prefix: int = 0) -> list[int]:
        """Tokenise the pieces; each but the first loses the tokens of the blank that is put before a text."""
        token_ids = self._encode(pieces[0])
        for piece in pieces[1:]:
            token_ids += self._encode(piece)[num_prefix:]
        return token_ids

    @staticmethod
    def _cut(data: bytes, cuts: Sequence[int]) -> list[bytes]:
        return [data[start:end] for start, end in pairwise([0, *cuts, len(data)])]

    def _number_cuts(self, data: bytes) -> list[int]:
        """Return cuts in long numbers, at whole groups from their ends."""
        numbers = list(_NUMBER.finditer(data))
        if not numbers:
            return []
        if self._groups_digits is None:
            self._groups_digits = all(map(self._keeps_groups_apart, self._numbers_of_tokens()))
        if not self._groups_digits:
            return []
        return [cut for number in numbers for cut in _group_cuts(*number.span(), NUMBER_PIECE)]

    def _numbers_of_tokens(self) -> Iterator[bytes]:
        """Yield texts of numbers in which each token with several digits could reach over the end of a group."""
        digits = random.Random(0)

        def some(num: int) -> bytes:
            return b"".join(b"%d" % digits.randrange(10) for _ in range(num))

        yield b"a".join(some(num) for num in range(1, 60))
        found = {number for text in self._texts() for number in _DIGITS.findall(text)}
        for number in sorted(found):
            yield b"a".join(
                some(before) + number + some(behind) for before in (0, 4) for behind in range(4)
            )

    def _keeps_groups_apart(self, numbers: bytes) -> bool:
        """Whether the numbers, with letters between them, have the tokens of their groups of digits."""
        cuts = [
            cut
            for number in re.finditer(rb"[0-9]+", numbers)
            for cut in _group_cuts(*number.span(), DIGITS_PER_GROUP)
        ]
        return self._joined(self._cut(numbers, cuts)) == self._encode(numbers)

    def _encode_sentence_pieces(self, data: bytes) -> list[int]:
        """Tokenise a long text cut before characters that nothing merges with."""
        text = data.decode("utf-8", errors="replace")
        if text.encode() != data:
            return self._encode(data)
        free = self._never_merging([c for c, _ in Counter(text).most_common(MAX_CUT_CHARACTERS)])
        if not free:
            return self._encode(data)
        once, twice = self._encode(free[0].encode()), self._encode(2 * free[0].encode())
        pattern = re.compile(f"[{re.escape(''.join(free))}]")
        pieces, start = [], 0
        while match := pattern.search(text, start + TEXT_PIECE):
            pieces.append(text[start : match.start()].encode())
            start = match.start()
        return self._joined([*pieces, text[start:].encode()], 2 * len(once) - len(twice))

    def _never_merging(self, characters: Sequence[str]) -> list[str]:
        """Return those that are in no token with other characters: what stands beside them is tokenised alone."""
        unknown = {c for c in characters if c not in self._merges}
        if unknown:
            merging = {" ", BLANK}
            for token in self._texts():
                text = token.decode("utf-8", errors="replace")
                if len(text) > 1:
                    merging |= unknown.intersection(text)
            self._merges |= {c: c in merging for c in unknown}
        return [c for c in characters if not self._merges[c]]


def _group_cuts(start: int, end: int, step: int) -> list[int]:
    """Return the places inside a number, from `start` to `end`, that are multiples of `step` before its end."""
    return list(range(end - step, start, -step))[::-1]

"""TextCuts: where a long text is cut before llama.cpp tokenises it, because the whole would take quadratic time.

Three parts of llama.cpp's tokenizers take time by the square of the text. A pre-tokenizer that groups digits from their
end looks to the end of the number at each digit. One that groups blanks looks at each group for a new line behind all
of them. SentencePiece's search copies all tokens at each character that has no token of its own. A cut never changes
the tokens: it is made only where no token can reach over it.
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
BLANKS_PER_GROUP = 512
LONG_BLANKS, BLANK_PIECE = 8192, 4096
"""Blanks of a run that is cut, and of each piece (a multiple of `BLANKS_PER_GROUP`)."""
LONG_TEXT, TEXT_PIECE = 32 << 10, 8 << 10
"""Bytes of a text that is cut for SentencePiece, and the least characters of a piece."""
MAX_CUT_CHARACTERS = 256
"""How many different characters, the most frequent ones, a text may be cut before."""
BLANK = "▁"
_NUMBER = re.compile(rb"[0-9]{%d,}" % LONG_NUMBER)
_BLANKS = re.compile(
    rb"(?:(?<![\x80-\xff\s])|(?<=[\r\n]))(?: {%d,}|\t{%d,})(?![\x80-\xff\s])"
    % (LONG_BLANKS, LONG_BLANKS)
)
"""A run of one blank that no other blank stands beside: its groups begin with it."""
_DIGITS = re.compile(rb"[0-9]{2,}")

Encode = Callable[[bytes], list[int]]


class TextCuts:
    """The cuts for one vocabulary of llama.cpp's type `kind`.

    `encode` tokenises text without control tokens, and `texts` yields the texts of all tokens.
    """

    def __init__(self, kind: int, encode: Encode, texts: Callable[[], Iterator[bytes]]) -> None:
        self._kind, self._encode, self._texts = kind, encode, texts
        self._groups_digits: bool | None = None
        self._groups_blanks: dict[bytes, bool] = {}
        self._merges: dict[str, bool] = {}

    def encode(self, data: bytes) -> list[int]:
        """Return the tokens of `data`, UTF-8, as `encode` would."""
        if self._kind == BYTE_PAIRS:
            cuts = sorted([*self._number_cuts(data), *self._blank_cuts(data)])
            return self._joined(self._cut(data, cuts))
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

    def _blank_cuts(self, data: bytes) -> list[int]:
        """Return cuts in long runs of a blank, at whole groups from their begin; a group stays before what follows."""
        return [
            cut
            for run in _BLANKS.finditer(data)
            if self._has_groups_of(data[run.start() : run.start() + 1])
            for cut in range(run.start() + BLANK_PIECE, run.end() - BLANKS_PER_GROUP, BLANK_PIECE)
        ]

    def _has_groups_of(self, blank: bytes) -> bool:
        """Whether runs of a blank have the tokens of their groups, whatever stands beside them."""
        if blank not in self._groups_blanks:
            lengths = random.Random(0)
            self._groups_blanks[blank] = all(
                self._keeps_blanks_apart(before, blank * lengths.randrange(1024, 4096), behind)
                for before in (b"", b"a", b"1", b".", b"\n")
                for behind in (b"", b"a", b"1", b".")
            )
        return self._groups_blanks[blank]

    def _keeps_blanks_apart(self, before: bytes, blanks: bytes, behind: bytes) -> bool:
        text, start = before + blanks + behind, len(before)
        end = start + len(blanks)
        cuts = list(range(start + BLANKS_PER_GROUP, end - BLANKS_PER_GROUP, BLANKS_PER_GROUP))
        return self._joined(self._cut(text, cuts)) == self._encode(text)

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

"""Long texts are cut where llama.cpp's tokenizer takes quadratic time: with the tokens of the whole text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import opened, write_vocabulary

from lowtide.models.errors import ModelError
from lowtide.models.gguf.text.text_cuts import TextCuts
from lowtide.models.gguf.text.tokenizer import GgufTokenizer


def _whole(tokenizer: GgufTokenizer, text: str) -> list[int]:
    return tokenizer._call(text.encode(), add_special=False, parse_special=False)


def _write_numbers(path: Path, pre: str) -> Path:
    """Write a vocabulary that merges digits."""
    merges = ("1 2", "12 3", "9 9", "0 0", "12 34", "00 0", "3 4", "4 5", "5 6")
    return write_vocabulary(path, pre=pre, merges=merges)


@pytest.mark.parametrize("pre", ["superbpe", "gpt-2", "llama-bpe", "qwen2", "viking", "falcon"])
def test_numbers_have_the_tokens_of_the_whole_text(tmp_path: Path, pre: str) -> None:
    digits = random.Random(1)
    with opened(_write_numbers(tmp_path / "a.gguf", pre)) as tokenizer:
        for length in (149, 150, 151, 152, 600, 1001):
            for characters in ("0123456789", "12", "9", "0"):
                number = "".join(digits.choice(characters) for _ in range(length))
                for text in (number, f"x{number}", f"{number} tide", f"½{number}²٣{number}.5"):
                    assert tokenizer.encode(text, add_special=False, parse_special=False) == _whole(
                        tokenizer, text
                    ), (length, text[:20])


@pytest.mark.parametrize(("pre", "groups"), [("superbpe", True), ("gpt-2", False)])
def test_a_pre_tokenizer_that_groups_digits_is_found_by_its_tokens(
    tmp_path: Path, pre: str, groups: bool
) -> None:
    with opened(_write_numbers(tmp_path / "a.gguf", pre)) as tokenizer:
        calls: list[int] = []
        call = tokenizer._call

        def counted(data: bytes, **options: bool) -> list[int]:
            calls.append(len(data))
            return call(data, **options)

        tokenizer._call = counted  # type: ignore[method-assign]
        tokenizer.encode("7" * 20_000, add_special=False, parse_special=False)
        assert (max(calls) < 2000) is groups


BLANK_MERGES = ("Ġ Ġ", "ĠĠ Ġ", "ĠĠ ĠĠ", "ĠĠĠĠ ĠĠ", "Ġ t", "ĉ ĉ")


@pytest.mark.parametrize(
    ("pre", "blank"),
    [("jais-2", " "), ("jais-2", "\t"), ("gpt-2", " "), ("llama-bpe", "\t"), ("superbpe", " ")],
)
def test_blanks_have_the_tokens_of_the_whole_text(tmp_path: Path, pre: str, blank: str) -> None:
    path = write_vocabulary(tmp_path / "a.gguf", pre=pre, merges=BLANK_MERGES)
    with opened(path) as tokenizer:
        for length in (8192, 9001):
            for begin in ("", "tide", "½", " \n", "\t"):
                for end in ("", "tide", "½", " \n", "7"):
                    text = begin + blank * length + end
                    assert tokenizer.encode(text, add_special=False, parse_special=False) == _whole(
                        tokenizer, text
                    ), (length, begin, end)


def test_long_runs_of_blanks_are_tokenised_in_pieces(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "a.gguf", pre="jais-2", merges=BLANK_MERGES)
    with opened(path) as tokenizer:
        calls: list[int] = []

        def counted(data: bytes) -> list[int]:
            calls.append(len(data))
            return tokenizer._call(data, add_special=False, parse_special=False)

        TextCuts(2, counted, tokenizer._texts).encode(b"tide\n" + b" " * 100_000 + b"tide")
    assert max(calls) < 9000


def test_a_token_that_reaches_over_groups_of_blanks_keeps_them_together(tmp_path: Path) -> None:
    doubled = ["Ġ" * (1 << i) for i in range(11)]
    merges = [f"{half} {half}" for half in doubled]  # up to 2,048 blanks in a token
    path = write_vocabulary(tmp_path / "a.gguf", pre="llama-bpe", merges=merges)
    with opened(path) as tokenizer:
        text = " " * 10_000
        assert tokenizer.encode(text, add_special=False, parse_special=False) == _whole(
            tokenizer, text
        )
        assert tokenizer._cuts._groups_blanks == {b" ": False}


PIECES = ("\n", "😀", "Ж", "tide", "é", "中", " ", "  ", "A", "AA", "▁", "\u0301", "<0x0A>", "<s>")


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=12),
    add_space_prefix=st.booleans(),
    user_defined=st.sampled_from([(), ("\n",), ("\n\n",), ("😀",)]),
)
def test_a_long_text_has_its_tokens_with_sentence_pieces(
    tmp_path_factory: pytest.TempPathFactory,
    pieces: Sequence[str],
    add_space_prefix: bool,
    user_defined: Sequence[str],
) -> None:
    path = tmp_path_factory.mktemp("v") / "a.gguf"
    write_vocabulary(path, "llama", user_defined=user_defined, add_space_prefix=add_space_prefix)
    text = "".join(pieces)
    text *= 40_000 // len(text.encode()) + 1
    with opened(path) as tokenizer:
        assert tokenizer.encode(text, add_special=False, parse_special=False) == _whole(
            tokenizer, text
        )


def test_a_long_text_is_tokenised_in_pieces(tmp_path: Path) -> None:
    with opened(write_vocabulary(tmp_path / "a.gguf", "llama")) as tokenizer:
        calls: list[int] = []

        def counted(data: bytes) -> list[int]:
            calls.append(len(data))
            return tokenizer._call(data, add_special=False, parse_special=False)

        cuts = TextCuts(1, counted, tokenizer._texts)
        assert cuts.encode(b"\n" * 300_000) == _whole(tokenizer, "\n" * 300_000)
        assert max(calls) <= 8 << 10
        calls.clear()
        cuts.encode(b"tide " * 100_000)  # nothing to cut before
        assert calls == [500_000]


def test_a_long_text_without_tokens_is_refused(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "a.gguf", "llama", with_bytes=False)
    with opened(path) as tokenizer, pytest.raises(ModelError, match="cannot tokenise this text"):
        tokenizer.encode("ж" * 100_000, add_special=False, parse_special=False)

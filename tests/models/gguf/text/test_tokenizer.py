from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowtide import Runtime
from lowtide.models.fake_model import ByteTokenizer
from lowtide.models.text.tokenizer import TextStream, Tokenizer

HARD = "naïve 日本語 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁳󠁣󠁴󠁿 e\u0301 ﷽ 𝔘𝔫𝔦 ‮abc‬ \u200b|"

# This vocabulary has no tokens for some control characters and rare planes.
LETTERS = st.characters(categories=["L", "N", "P", "Zs"], max_codepoint=0xFFFF)


def _streamed(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.push(token_id) for token_id in token_ids]


@given(st.text(max_size=60))
def test_bytes_stream_to_the_same_text_and_never_half_a_character(text: str) -> None:
    tokenizer = ByteTokenizer()
    token_ids = tokenizer.encode(text, add_special=False, parse_special=False)
    pieces = _streamed(tokenizer, token_ids)
    expected = text.encode("utf-8", errors="replace").decode()
    assert "".join(pieces) == expected
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in expected


def test_an_emoji_over_several_tokens_of_the_real_model(real_runtime: Runtime) -> None:
    tokenizer = real_runtime._model.tokenizer
    token_ids = tokenizer.encode("🦭", add_special=False, parse_special=False)
    assert len(token_ids) > 1
    pieces = _streamed(tokenizer, token_ids)
    assert pieces == [""] * (len(token_ids) - 1) + ["🦭"]


def test_half_a_character_at_the_end_is_not_printed(real_runtime: Runtime) -> None:
    tokenizer = real_runtime._model.tokenizer
    token_ids = tokenizer.encode("ab🦭", add_special=False, parse_special=False)
    assert "".join(_streamed(tokenizer, token_ids[:-1])) == "ab"


@given(st.text(LETTERS, max_size=80))
def test_texts_round_trip_in_the_real_vocabulary(real_runtime: Runtime, text: str) -> None:
    tokenizer = real_runtime._model.tokenizer
    token_ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert "".join(_streamed(tokenizer, token_ids)) == text


def test_hard_text_round_trips(real_runtime: Runtime) -> None:
    tokenizer = real_runtime._model.tokenizer
    token_ids = tokenizer.encode(HARD, add_special=False, parse_special=False)
    assert tokenizer.decode(token_ids) == HARD


def test_control_tokens_are_parsed_only_where_allowed(real_runtime: Runtime) -> None:
    tokenizer = real_runtime._model.tokenizer
    end = tokenizer.encode("<|im_end|>", add_special=False, parse_special=True)
    plain = tokenizer.encode("<|im_end|>", add_special=False, parse_special=False)
    assert len(end) == 1 and tokenizer.is_end(end[0])
    assert len(plain) > 1 and not any(map(tokenizer.is_end, plain))
    assert tokenizer.token_bytes(end[0]) == b""
    assert tokenizer.special_texts["eos_token"] == "<|im_end|>"


def test_all_pieces_in_one_call_are_those_of_single_tokens(real_runtime: Runtime) -> None:
    tokenizer = real_runtime._model.tokenizer
    num_tokens = real_runtime.spec.vocabulary.num_tokens
    for count in (num_tokens, 300, 0):
        text, starts = tokenizer.pieces(count)
        assert len(starts) == count + 1 and starts[-1] == len(text)
        for token_id in range(0, count, 7):
            piece = text[starts[token_id] : starts[token_id + 1]]
            assert piece == tokenizer.token_bytes(token_id)

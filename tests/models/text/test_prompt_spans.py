"""What a message says is text: control tokens come from the template's spans alone, with every kind of vocabulary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vocabularies import CONTROL, KINDS, opened, write_vocabulary

from lowtide.models.catalog import resolve
from lowtide.models.fake_model import ByteTokenizer
from lowtide.models.gguf.text.tokenizer import GgufTokenizer
from lowtide.models.text.prompt_span import PromptSpan, split_spans, text_of
from lowtide.models.text.tokenizer import Tokenizer

MARKERS = ("<|end|>", "<tool>", "[INST]")
HARMLESS = ("\n\n", "  ", "tidetide")
SPELLED = (*CONTROL, *MARKERS, "<s>", "</s>", "<unk>", "<end_of_turn>", "<bos>", "<|endoftext|>")
WORDS = (
    "tide",
    "ab",
    " ",
    "\n",
    "\n\n",
    "  ",
    "é",
    "中",
    "😀",
    "AA",
    "tidetide",
    "<",
    "|>",
    "\x00",
    "\ud800",
)
PARTS = tuple(text[:cut] for text in SPELLED for cut in (1, 2, len(text) - 1))
PARTS += tuple(text[cut:] for text in SPELLED for cut in (1, 2, len(text) - 1))
REAL = ("smollm2", "gemma3-270m")

said = st.lists(st.sampled_from((*WORDS, *SPELLED, *PARTS)), max_size=6).map("".join) | st.text(
    max_size=4
)
written = st.lists(st.sampled_from((*WORDS, *SPELLED, *PARTS)), max_size=4).map("".join)
plain = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)


class Tokenizers(dict[str, GgufTokenizer]):
    """The tokenizer of each vocabulary, opened where it is asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack

    def __missing__(self, name: str) -> GgufTokenizer:
        self[name] = self._stack.enter_context(opened(self._path(name)))
        return self[name]

    def _path(self, name: str) -> Path:
        if name in REAL:
            return resolve(name)
        path, user_defined = self._folder / f"{name}.gguf", (*MARKERS, *HARMLESS)
        if name == "phi3":
            control = (*CONTROL, "<|endoftext|>")
            return write_vocabulary(
                path, "llama", name="phi-3", control=control, user_defined=user_defined
            )
        if name == "tekken":
            return write_vocabulary(path, pre="tekken", user_defined=user_defined)
        return write_vocabulary(path, name, user_defined=user_defined)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizers]:
    with ExitStack() as stack:
        yield Tokenizers(tmp_path_factory.mktemp("vocabularies"), stack)


EVERY = (*KINDS, "phi3", "tekken", *(pytest.param(name, marks=pytest.mark.real) for name in REAL))


def _spans(texts: list[str]) -> list[PromptSpan]:
    """Texts of the template and of messages, in turn."""
    return [PromptSpan(text, from_message=bool(i % 2)) for i, text in enumerate(texts)]


def _control_ids(tokenizer: GgufTokenizer, token_ids: list[int], template: str) -> list[int]:
    special = tokenizer._span_encoder._vocabulary.special_tokens  # type: ignore[attr-defined]
    unknown = tokenizer._span_encoder._vocabulary._unknown  # type: ignore[attr-defined]
    control = {
        token.token_id
        for token in special
        if token.is_control or (token.may_mark and token.text.decode() in template)
    }
    return [token_id for token_id in token_ids if token_id in control - unknown]


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=30)
@given(data=st.data())
def test_control_tokens_are_those_of_a_harmless_chat(
    name: str, tokenizers: Tokenizers, data: st.DataObject
) -> None:
    tokenizer, num = tokenizers[name], data.draw(st.integers(1, 3))
    template = [data.draw(written) for _ in range(num + 1)]
    messages = [data.draw(said) for _ in range(num)]
    both = [text for pair in zip(template, messages, strict=False) for text in pair] + template[-1:]
    harmless = [text if i % 2 == 0 else "word" for i, text in enumerate(both)]
    source = "\0".join(template)
    mine = tokenizer.encode_spans(_spans(both), add_special=True, template=source)
    other = tokenizer.encode_spans(_spans(harmless), add_special=True, template=source)
    assert _control_ids(tokenizer, mine, source) == _control_ids(tokenizer, other, source)


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=30)
@given(data=st.data())
def test_a_chat_that_spells_no_token_has_the_tokens_of_the_whole_text(
    name: str, tokenizers: Tokenizers, data: st.DataObject
) -> None:
    tokenizer = tokenizers[name]
    spans = _spans([data.draw(plain if i % 2 else written) for i in range(5)])
    text = text_of(spans)
    alone = [part for span in spans for part in _special_in(tokenizer, span)]
    assume(_special_in(tokenizer, PromptSpan(text, False)) == alone)  # none over a border
    whole = tokenizer.encode(text, add_special=False, parse_special=True)
    assert tokenizer.encode_spans(spans, add_special=False) == whole


def _special_in(tokenizer: GgufTokenizer, span: PromptSpan) -> list[int]:
    if span.from_message:
        return []
    ids = tokenizer.encode(span.text, add_special=False, parse_special=True)
    control = tokenizer._span_encoder._vocabulary._control  # type: ignore[attr-defined]
    return [token_id for token_id in ids if token_id in control]


@pytest.mark.parametrize("name", ("gpt2", "tekken"))
def test_text_that_spells_a_token_stays_what_it_is(name: str, tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers[name]
    for message in (
        "<|im_end|>",
        "a<|im_end|>\n<|im_start|>user\n",
        "</s><|end|>x",
        "im_end|>",
        "[INST]",
    ):
        spans = _spans(["<|im_start|>user\n<|", message, "<|im_end|>\n<|end|>[INST]"])
        token_ids = tokenizer.encode_spans(spans, add_special=False)
        assert message in tokenizer.decode(token_ids)
        assert (
            token_ids.count(
                tokenizer.encode("<|im_end|>", add_special=False, parse_special=True)[0]
            )
            == 1
        )


def test_the_blanks_are_those_of_the_whole_text(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["llama"]
    whole = tokenizer.encode("a tide ab", add_special=False, parse_special=True)
    assert tokenizer.encode_spans(_spans(["a ", "tide", " ab"]), add_special=False) == whole
    first = tokenizer.encode("a ti", add_special=False, parse_special=False)
    rest = tokenizer.encode_spans(_spans(["x tide"]), add_special=False, continues=True)
    assert tokenizer.decode([*first, *rest]) == " a tix tide"
    forged = tokenizer.encode_spans(_spans(["", "ab </s> ab"]), add_special=False)
    assert tokenizer.decode(forged) == " ab </s> ab"


@pytest.mark.parametrize("name", EVERY)
def test_bos_is_never_doubled(name: str, tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers[name]
    plain_ids = tokenizer.encode_spans(_spans(["tide"]), add_special=True)
    assert plain_ids == tokenizer.encode("tide", add_special=True, parse_special=False)
    bos = tokenizer.special_texts["bos_token"]
    written_out = tokenizer.encode_spans(_spans([f"{bos}tide"]), add_special=True)
    said = tokenizer.encode_spans(_spans(["", f"{bos}tide"]), add_special=True)
    bos_ids = tokenizer.encode(bos, add_special=False, parse_special=True)
    assert written_out.count(bos_ids[0]) == 1
    assert said.count(bos_ids[0]) == plain_ids.count(bos_ids[0])


def test_spans_are_split_at_a_character() -> None:
    spans = _spans(["ab", "cde", "f"])
    for at in range(8):
        before, behind = split_spans(spans, at)
        assert text_of(before) == "abcdef"[:at] and text_of(behind) == "abcdef"[at:]


@given(st.lists(written, max_size=5))
def test_the_byte_tokenizer_reads_messages_as_text(texts: list[str]) -> None:
    tokenizer: Tokenizer = ByteTokenizer()
    texts = [text.replace("<|im", "<|end|><|start") for text in texts]
    token_ids = tokenizer.encode_spans(_spans(texts), add_special=True)
    template = [
        i
        for text in texts[::2]
        for i in tokenizer.encode(text, add_special=False, parse_special=True)
    ]
    assert [i for i in token_ids[1:] if i > 255] == [i for i in template if i > 255][
        template[:1] == [256] :
    ]


def test_many_forged_markers_take_linear_time(tmp_path: Path) -> None:
    """llama.cpp's own search takes quadratic time: 189 s for a megabyte."""
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", user_defined=["<b>", "\n\n"])
    times = []
    with opened(path) as tokenizer:
        for number in (2_000, 40_000):
            spans = [PromptSpan("<b>" * number, True), PromptSpan("<b>", False)]
            start = time.process_time()
            token_ids = tokenizer.encode_spans(spans, add_special=False, template="<b>")
            times.append(time.process_time() - start)
            assert len(token_ids) == 3 * number + 1
    assert times[1] < 60 * times[0]

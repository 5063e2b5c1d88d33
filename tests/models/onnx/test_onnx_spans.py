"""What a message says is text, with the tokenizers of ONNX folders, too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.models.onnx.tokenizer import OnnxTokenizer
from lowtide.models.text.prompt_span import PromptSpan

tokenizers = pytest.importorskip("tokenizers")
CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im|>")
MARKERS = ("<tool>", "<|end|>")
WORDS = ("tide", "ab", " ", "\n", "é", "中", "<|", "|>", "\ud800", "im_end|>", "<|im_end", "</")
KINDS = ("bytes", "blank first", "blank always", "phi")


def _bytes() -> Any:
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(sorted(letters))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def _pieces(scheme: str) -> Any:
    texts = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"tideabc<>|/_",
        "</",
        "s>",
        "</s>",
    ]
    vocabulary = {text: i for i, text in enumerate(texts)}
    model = tokenizers.models.BPE(
        vocabulary, [("<", "/"), ("</", "s>")][:1], unk_token="<unk>", byte_fallback=True
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = tokenizers.decoders.Metaspace()
    return made


def _tokenizer(kind: str, folder: Path) -> OnnxTokenizer:
    made = _bytes() if kind in ("bytes", "phi") else _pieces(kind.removeprefix("blank "))
    strips = kind == "phi"
    added = tokenizers.AddedToken
    made.add_special_tokens([added(text, rstrip=strips, normalized=False) for text in CONTROL])
    made.add_tokens([added(text, normalized=False) for text in MARKERS])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    path = folder / "tokenizer.json"
    made.save(str(path))
    spec: Any = SimpleNamespace(
        tokenizer_path=path,
        vocabulary=SimpleNamespace(num_tokens=1000),
        special_texts={"bos_token": "<s>", "eos_token": "</s>"},
        end_ids=(made.token_to_id("<|end|>"),),
    )
    return OnnxTokenizer(spec)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> OnnxTokenizer:
    return _tokenizer(request.param, tmp_path_factory.mktemp("tokenizer"))


said = st.lists(st.sampled_from((*WORDS, *CONTROL, *MARKERS)), max_size=6).map("".join)
plain = st.lists(st.sampled_from(("tide", "ab", " ", "\n", "é", "中")), max_size=6).map("".join)


def _spans(texts: list[str]) -> list[PromptSpan]:
    return [PromptSpan(text, from_message=bool(i % 2)) for i, text in enumerate(texts)]


def _control(tokenizer: OnnxTokenizer, token_ids: list[int], template: str) -> list[int]:
    vocabulary = tokenizer._span_vocabulary
    marks = {i for i, text in vocabulary._markers.items() if text in template}
    return [i for i in token_ids if vocabulary.is_control(i) or i in marks]


@settings(max_examples=40)
@given(texts=st.lists(said, min_size=1, max_size=5))
def test_control_tokens_are_those_of_a_harmless_chat(
    tokenizer: OnnxTokenizer, texts: list[str]
) -> None:
    template = "\0".join(texts[::2])
    harmless = [text if i % 2 == 0 else "word" for i, text in enumerate(texts)]
    mine = tokenizer.encode_spans(_spans(texts), add_special=True, template=template)
    other = tokenizer.encode_spans(_spans(harmless), add_special=True, template=template)
    assert _control(tokenizer, mine, template) == _control(tokenizer, other, template)


@settings(max_examples=40)
@given(texts=st.lists(plain, min_size=3, max_size=3), control=st.sampled_from(CONTROL))
def test_other_chats_have_the_tokens_of_the_whole_text(
    tokenizer: OnnxTokenizer, texts: list[str], control: str
) -> None:
    texts[0] += control
    texts[2] = control + texts[2]
    whole = tokenizer.encode("".join(texts), add_special=False, parse_special=True)
    assert tokenizer.encode_spans(_spans(texts), add_special=False) == whole
    # The same with a message that forges a token behind it: what lies before stays.
    forged = tokenizer.encode_spans(_spans([*texts, "<|im_end|>"]), add_special=False)
    if texts[2] == control:
        assert forged[: len(whole)] == whole


def test_a_forged_text_is_the_text(tokenizer: OnnxTokenizer) -> None:
    token_ids = tokenizer.encode_spans(
        _spans(["<|im_start|>", "ab </s> <tool> ab", "<|im_end|><tool>"]), add_special=False
    )
    assert "ab </s> <tool> ab" in tokenizer.decode(token_ids)


def test_a_long_run_is_tokenised(tokenizer: OnnxTokenizer) -> None:
    for text in ("A", " ", "\n", "-", "中", "1"):
        assert (
            len(tokenizer.encode(text * 50_000, add_special=False, parse_special=False)) >= 50_000
        )

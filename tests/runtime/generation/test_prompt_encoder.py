"""A continued chat has the tokens of the same chat read anew, where its answers are tokenised alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabularies import opened, write_vocabulary

from lowtide.models.gguf.text.tokenizer import GgufTokenizer
from lowtide.runtime.generation.chat import PromptEncoder
from lowtide.runtime.generation.turns import LastTurn
from lowtide.runtime.options import SamplingParams

TEMPLATES = {
    "markers": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n",
    "words": "{% for m in messages %}{{ m.role }}: {{ m.content }} tide {% endfor %}assistant: ",
    "bos": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} ab{% endif %}"
    "{% endfor %}",
}
KINDS = ("llama", "gpt2", "t5", "rwkv")
text = st.lists(
    st.sampled_from(("tide", " ", "\n", "ab", "<|im_end|>", "</s>", "é", "AA")), max_size=5
).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GgufTokenizer]:
    path = tmp_path_factory.mktemp("v") / "v.gguf"
    with opened(write_vocabulary(path, request.param)) as found:
        yield found


def _encoded(encoder: PromptEncoder, *texts: str) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": said} for i, said in enumerate(texts)]
    request, prompt = encoder.encode_chat(messages, 100_000, SamplingParams(), 0.0)
    encoder.last_prompt = prompt  # type: ignore[attr-defined]
    return list(request.token_ids)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=text, answer=text, then=text)
def test_a_continued_chat_is_the_chat_read_anew(
    tokenizer: GgufTokenizer, template: str, first: str, answer: str, then: str
) -> None:
    source = TEMPLATES[template]
    encoder = PromptEncoder(tokenizer, source, LastTurn())
    prompt_ids = _encoded(encoder, first)
    anew = PromptEncoder(tokenizer, source, LastTurn())
    with_answer = tokenizer.encode_spans(
        [*_rendered(anew, first)[0], *_said(answer)], add_special=True, template=source
    )
    if with_answer[: len(prompt_ids)] != prompt_ids:
        return  # a token reaches over the end of the prompt: no model can sample this answer
    encoder.remember(encoder.last_prompt, with_answer[len(prompt_ids) :])  # type: ignore[attr-defined]
    assert _encoded(encoder, first, answer, then) == _encoded(anew, first, answer, then)


def test_other_tokens_of_an_answer_stay(tokenizer: GgufTokenizer) -> None:
    encoder = PromptEncoder(tokenizer, TEMPLATES["words"], LastTurn())
    prompt_ids = _encoded(encoder, "ab")
    sampled = [
        i
        for letter in "tide"
        for i in tokenizer.encode_spans(_said(letter), add_special=False, continues=True)
    ]
    encoder.remember(encoder.last_prompt, sampled)  # type: ignore[attr-defined]
    token_ids = _encoded(encoder, "ab", "tide", "AA")
    assert token_ids[: len(prompt_ids) + 4] == [*prompt_ids, *sampled]
    assert tokenizer.decode(token_ids).endswith("assistant: tide tide user: AA tide assistant: ")


def test_a_message_that_spells_the_last_turn_gets_no_control_tokens(
    tokenizer: GgufTokenizer,
) -> None:
    source = TEMPLATES["markers"]
    last = LastTurn()
    encoder = PromptEncoder(tokenizer, source, last)
    anew = PromptEncoder(tokenizer, source, LastTurn())
    _encoded(encoder, "ab")
    answer_ids = tokenizer.encode_spans(_said("tide"), add_special=False, continues=True)
    encoder.remember(encoder.last_prompt, answer_ids[::-1])  # type: ignore[attr-defined]
    forged = last.text.removeprefix("<|im_start|>user\n")
    assert _encoded(encoder, forged, "AA", "tide") == _encoded(anew, forged, "AA", "tide")


def _said(said: str):  # type: ignore[no-untyped-def]
    from lowtide.models.text.prompt_span import PromptSpan

    return [PromptSpan(said, from_message=True)]


def _rendered(encoder: PromptEncoder, said: str):  # type: ignore[no-untyped-def]
    _encoded(encoder, said)
    assert encoder._template is not None
    return (encoder._template.render([{"role": "user", "content": said}]),)

"""Sentences of several questions in one text: their positions, and prompts that differ at their end."""

from __future__ import annotations

import pytest

from lowtide.attention.evaluation.questions import (
    HARD_KINDS,
    KINDS,
    Haystack,
    HiddenQuestion,
    Question,
    Reply,
    ask,
    is_answered,
)
from lowtide.attention.policy import PassController
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import ByteTokenizer, FakeModel
from lowtide.models.text.tokenizer import common_prefix

TOKENIZER = ByteTokenizer()
TEXT = list(b"The tide comes in, and goes. ") * 200
DEPTHS = (0.1, 0.5, 0.9)


def haystack() -> Haystack:
    return Haystack(TOKENIZER, TEXT, framing=lambda text: f"<|start|>user\n{text}<|end|>\n")


def hidden(*kinds: str, length: int = 4000) -> list[HiddenQuestion]:
    asked = [(ask(kind, 3), DEPTHS[at % 3]) for at, kind in enumerate(kinds)]
    return haystack().hide(asked, length)


@pytest.mark.parametrize("kinds", [KINDS, (*KINDS, *HARD_KINDS)])
def test_every_sentence_is_at_its_span(kinds: tuple[str, ...]) -> None:
    for found in hidden(*kinds):
        sentence = [TOKENIZER.decode(found.token_ids[begin:end]) for begin, end in found.spans]
        assert sentence == list(found.question.sentences)
        assert 0.8 * 4000 < len(found.token_ids) <= 4000
        assert abs(found.spans[0][0] / 4000 - found.depth) < 0.12
        asked = TOKENIZER.decode(found.token_ids)
        assert asked.count(found.question.text) == 1
        for question in (ask(kind, 3) for kind in kinds):
            assert all(
                f"\n{sentence}{question.aside}\n" in asked for sentence in question.sentences
            )


def test_prompts_of_one_text_differ_only_in_their_questions() -> None:
    first, second, third = hidden(*KINDS)
    for other in (second, third):
        assert common_prefix(first.token_ids, other.token_ids) > len(first.token_ids) - 130


def test_a_question_that_comes_first_is_before_the_text() -> None:
    found = hidden("question first")[0]
    asked = TOKENIZER.decode(found.token_ids)
    assert asked.index(found.question.text) < asked.index("The tide comes in")
    assert asked.rstrip()[-30:] in bytes(TEXT).decode()


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(BadOption, match="prompts of 7000 tokens leave .* the text has 5800"):
        hidden("fact", length=7000)
    with pytest.raises(BadOption, match="prompts of 200 tokens leave -"):
        hidden(*KINDS, length=200)


def test_a_question_describes_itself() -> None:
    assert str(hidden("fact")[0]) == "fact at 10% of 4,000 tokens"


@pytest.mark.parametrize(
    ("says", "right"), [(" plums, I think", True), (" plums, we think", False), (" I know", False)]
)
def test_all_replies_must_be_right(says: str, right: bool) -> None:
    model = FakeModel([says], context=512)  # goes on with the first ten of its letters
    prompt = list(b"What does the winner get?\n")
    replies = (Reply("", ("plums",)), Reply("", ("I",)))
    found = HiddenQuestion(
        question=Question(kind="two facts", sentences=(), text="", replies=replies),
        length=100,
        depth=0.5,
        token_ids=prompt,
        spans=(),
        leads=((), ()),
    )
    assert is_answered(model, PassController(), prompt, found) == right

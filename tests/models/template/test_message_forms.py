"""What a template gets of a message: no keys that are None, and reasoning under each name that templates read."""

from __future__ import annotations

from typing import Any

import pytest

from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import TemplateError
from lowtide.models.text.prompt_span import text_of

USER = {"role": "user", "content": "Hi"}
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def _render(source: str, *messages: dict[str, Any]) -> str:
    return text_of(ChatTemplate(source, {}).render([*messages, USER]))


def test_keys_that_are_none_are_left_out() -> None:
    source = (
        "{% for m in messages %}{{ m.content is defined }}{{ 'tool_calls' in m }}{{ 'name' in m }};"
        "{% endfor %}"
    )
    answer = {"role": "assistant", "content": "x", "tool_calls": None, "name": None}
    call = {"role": "assistant", "content": None, "tool_calls": CALLS}
    assert _render(source, answer, call) == ("TrueFalseFalse;FalseTrueFalse;TrueFalseFalse;")


def test_a_template_that_needs_a_key_gets_it_as_none() -> None:
    source = "{% for m in messages %}{{ m['content'] + '' if m.content is not none }}{% endfor %}"
    assert _render(source, {"role": "assistant", "content": None, "tool_calls": CALLS}) == "Hi"
    with pytest.raises(TemplateError, match="has no attribute 'x'"):
        _render("{{ messages[0].x.y.z }}", {**USER, "x": None})


def test_a_template_that_needs_a_text_gets_an_empty_one() -> None:
    source = "{% for m in messages %}{{ m.role + ':' + m['content'] + ';' }}{% endfor %}"
    parts = {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
    call = {"role": "assistant", "content": None, "tool_calls": CALLS}
    assert _render(source, parts, call) == "system:Be kind.;assistant:;user:Hi;"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_the_names_that_templates_read(name: str) -> None:
    source = "{{ messages[0].reasoning_content }},{{ messages[0].thinking }}"
    message = {"role": "assistant", "content": "x", name: "why"}
    assert _render(source, message) == "why,why"


def test_reasoning_with_several_names() -> None:
    source = "{{ messages[0].reasoning_content }},{{ messages[0].thinking }}"
    message = {"role": "assistant", "content": "x", "thinking": "a", "reasoning": "b"}
    assert _render(source, message) == "a,a"


def test_reasoning_is_a_messages_text() -> None:
    message = {"role": "assistant", "content": "x", "reasoning": "<|im_end|>"}
    spans = ChatTemplate("{{ messages[0].thinking }}.", {}).render([message])
    assert [(span.text, span.from_message) for span in spans] == [
        ("<|im_end|>", True),
        (".", False),
    ]

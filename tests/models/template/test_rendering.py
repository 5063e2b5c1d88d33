"""Templates render what transformers renders: jinja2's own sandbox, set up in its way, is the oracle."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES
from jinja_oracle import oracle

from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import BadOption, TemplateError
from lowtide.models.text.prompt_span import text_of

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "You are kind."}
USER = {"role": "user", "content": "Hello <b>there</b>,  what is 'ß' in\tMünchen?  \n\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nAn eszett."}
RESULT = {"role": "tool", "name": "look_up", "tool_call_id": "abcdefghi", "content": '{"t": 5}'}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": 'Look "it" up, é',
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": "string", "description": "The word", "enum": ["a", "b"]},
                "n": {"type": ["integer", "null"]},
            },
            "required": ["word"],
        },
    },
}


def calling(arguments: Any, content: str | None = "") -> dict[str, Any]:
    function = {"name": "look_up", "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


MANY = [*[USER, ANSWER] * 499, USER]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]] = {
    "one turn": ([USER], None, {}),
    "system": ([SYSTEM, USER], None, {}),
    "three turns": ([USER, ANSWER, USER], None, {}),
    "five turns": ([SYSTEM, USER, ANSWER, USER, ANSWER, USER], None, {}),
    "tools": ([USER], [TOOL], {}),
    "tools and system": ([SYSTEM, USER], [TOOL, TOOL], {}),
    "call": ([USER, calling({"word": "Zürich", "n": 3}), RESULT], [TOOL], {}),
    "call without content": ([SYSTEM, USER, calling({"word": "a"}, None), RESULT, ANSWER, USER], [TOOL], {}),
    "argument": ([USER], None, {"enable_thinking": False}),
    "reasoning": ([USER, {**ANSWER, "reasoning_content": "why"}, USER], None, {"enable_thinking": True}),
    "1,000 messages": ([SYSTEM, *MANY], [TOOL], {}),
}  # fmt: skip


def both(source: str, name: str) -> tuple[str, str]:
    """Return the oracle's prompt and lowtide's; "an error", where one is raised.

    A template that fails without a content gets an empty one.
    """
    messages, tools, arguments = CONVERSATIONS[name]
    expected = "an error"
    for content in (None, ""):
        stated = [m if m["content"] is not None else {**m, "content": content} for m in messages]
        with contextlib.suppress(Exception):
            expected = oracle(
                source, stated, special_texts=SPECIAL, tools=tools, arguments=arguments
            )
            break
    try:
        template = ChatTemplate(source, SPECIAL)
        rendered = text_of(template.render(messages, tools=tools, arguments=arguments))
    except TemplateError:
        rendered = "an error"
    return expected, rendered


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_does(name: str, conversation: str) -> None:
    expected, rendered = both(TEMPLATES[name], conversation)
    assert rendered == expected
    if conversation == "one turn":
        assert rendered != "an error"


FOLDER = os.environ.get("LOWTIDE_CHAT_TEMPLATES", "")
"""A folder with chat templates of models, such as llama.cpp's models/templates; the tests bring none."""


@pytest.mark.parametrize("path", sorted(Path(FOLDER).glob("*.jinja")) if FOLDER else [])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_templates_of_models(path: Path, conversation: str) -> None:
    expected, rendered = both(path.read_text(encoding="utf-8"), conversation)
    if expected != "an error":
        assert rendered == expected


def render(source: str, *messages: dict[str, Any], **options: Any) -> str:
    return text_of(ChatTemplate(source, SPECIAL).render(messages, **options))


LONG = "Every word counts. " * 55_000


def test_a_long_text_of_megabytes_renders() -> None:
    message = {"role": "user", "content": LONG * 4}
    for name in ("loop", "replace by method", "split"):
        source = TEMPLATES[name]
        expected = oracle(source, [message], special_texts=SPECIAL)
        assert render(source, message) == expected


PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "one\ntwo"),
        ("{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}", "<one\ntwo>"),
        ("{% for m in messages %}{{ m.content | trim | upper }}{% endfor %}", "ONE\nTWO"),
        ("{% for m in messages %}{{ m.content.strip() }}{% endfor %}", "one\ntwo"),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}",
            "[one][two]",
        ),
    ],
)
def test_text_parts_come_in_the_form_that_the_template_expects(source: str, expected: str) -> None:
    assert render(source, PARTS) == expected


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video"])
def test_parts_that_are_no_text_are_refused(kind: str) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": kind, kind: {}}]}
    with pytest.raises(TemplateError, match=f"'{kind}', but lowtide reads text alone"):
        render(TEMPLATES["loop"], message)


DEFINED = "{% for c in messages[1].tool_calls %}{{ c.function.arguments OPERATION }}{% endfor %}"


@pytest.mark.parametrize("arguments", [{"word": "é"}, '{"word": "é"}'])
@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("| tojson", '{"word": "é"}'),
        ("+ '!'", '{"word": "é"}!'),
        (".word", "é"),
        (".items() | list | length", "1"),
    ],
)
def test_arguments_come_in_the_form_that_the_template_expects(
    arguments: Any, operation: str, expected: str
) -> None:
    source = DEFINED.replace("OPERATION", operation)
    if operation == ".word" and isinstance(arguments, str):
        expected = ""  # a text has no such attribute, which jinja2 prints as nothing
    assert render(source, USER, calling(arguments)) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}<{{ m.role }}>{% endfor %}", "<system><user>"),
        (
            "{% for m in messages %}{% if m.role == 'developer' %}D{% endif %}{% endfor %}",
            "D",
        ),
        (
            "{# developer #}{% for m in messages %}{% if m.role not in ['system', 'user'] %}"
            "{{ raise_exception('no') }}{% endif %}<{{ m.role }}>{% endfor %}",
            "<system><user>",
        ),
    ],
)
def test_a_developer_is_the_system_where_the_template_knows_none(
    source: str, expected: str
) -> None:
    assert render(source, {"role": "developer", "content": "x"}, USER) == expected


def test_a_role_that_the_template_names_is_valid() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'ipython' %}!{{ m.content }}{% endif %}{% endfor %}"
    )
    assert render(source, {"role": "ipython", "content": "5"}) == "!5"


def test_arguments_of_the_template() -> None:
    source = "{{ enable_thinking }}{{ effort | upper }}{{ documents }}"
    arguments = {"enable_thinking": False, "effort": "low", "documents": [1, None]}
    assert render(source, USER, arguments=arguments) == "FalseLOW[1, None]"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_arguments_that_lowtide_states_are_refused(name: str) -> None:
    with pytest.raises(BadOption, match=f"the template argument {name} is stated by lowtide"):
        render("x", USER, arguments={name: "x"})


def test_an_argument_of_an_odd_type_is_refused() -> None:
    with pytest.raises(TemplateError, match="holds a object: use texts, numbers"):
        render("x", USER, arguments={"x": object()})


def test_1000_messages_stay_inside_the_limits_where_each_looks_at_all() -> None:
    source = (
        "{% for m in messages %}{% set later = messages[loop.index:] | selectattr('role', 'equalto', 'user') "
        "| list %}{% for x in messages if x.role == 'system' %}{{ x.content }}{% endfor %}{{ later | length }}"
        "{% endfor %}"
    )
    expected = oracle(source, [SYSTEM, *MANY], special_texts=SPECIAL)
    assert render(source, SYSTEM, *MANY) == expected


@pytest.mark.parametrize(
    "source", ["{{ c.x.y }}", "{{ 1 + c }}", "{{ c - 1 }}", "{{ c.center('x') }}"]
)
def test_errors_call_a_messages_text_a_str(source: str) -> None:
    with pytest.raises(TemplateError, match="str") as caught:
        render("{% set c = messages[0].content %}" + source, USER)
    assert "Traced" not in str(caught.value)

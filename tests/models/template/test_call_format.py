"""Call formats from templates that write calls in ways of their own; all templates here are made for the test."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lowtide.models.chat_template import ChatTemplate
from lowtide.models.template.call_format import GENERIC, ID, call_format

TURNS = "{% for m in messages %}{% if m.role == 'assistant' %}"
REST = (
    "{% else %}[{{ m.role }}]{{ m.content }}[/{{ m.role }}]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)
EACH = "{% for c in m.tool_calls or [] %}"


def of(calls: str, start: str = "[answer]", end: str = "[/answer]", prompt: str = "") -> Any:
    answer = f"{start}{{{{ m.content or '' }}}}{calls}{end}"
    rest = REST.replace("[answer]", "[answer]" + prompt)
    return call_format(ChatTemplate(TURNS + answer + rest, {}))


def test_marked_json_objects() -> None:
    found = of(
        EACH + '<call>{"name": {{ c.function.name | tojson }}, "arguments": '
        "{{ c.function.arguments | tojson }}}</call>{% endfor %}"
    )
    assert (found.prefix, found.middle) == ('<call>{"name": "', '", "arguments": ')
    assert (found.suffix, found.between) == ("}</call>", '}</call><call>{"name": "')
    assert (found.trigger, found.behind_trigger) == ("<call>", '{"name": "')
    assert not found.is_generic and found.id_length == 0


def test_a_list_of_calls_whose_ids_have_nine_characters() -> None:
    found = of(
        "{% if m.tool_calls %}[CALLS]["
        + EACH
        + "{% if c.id | length != 9 %}{{ raise_exception('ids') }}"
        '{% endif %}{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}, '
        "\"id\": {{ c.id | tojson }}}{{ ', ' if not loop.last }}{% endfor %}]{% endif %}"
    )
    assert found.id_length == 9
    assert found.suffix == f', "id": "{ID}"}}]'
    assert found.between == f', "id": "{ID}"}}, {{"name": "'
    assert found.trigger == "[CALLS]"


def test_names_outside_of_json_and_arguments_as_text() -> None:
    found = of(
        EACH + "{{ '<fn>' + c.function.name + '<args>' + c.function.arguments }}{% endfor %}"
    )
    assert (found.prefix, found.middle, found.suffix) == ("<fn>", "<args>", "")
    assert found.between == "<fn>"


def test_one_call_a_turn_without_any_marker() -> None:
    found = of(
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}"
        + EACH
        + '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}'
    )
    assert found.prefix == '{"name": "' and found.between is None and found.trigger == ""


@pytest.mark.parametrize("style", ["compact", "indented"])
def test_the_style_of_the_json_is_found(style: str) -> None:
    how = {"compact": "separators=(',', ':')", "indented": "indent=4"}[style]
    found = of(
        EACH
        + "<call>{{ c.function.name }}:{{ c.function.arguments | tojson("
        + how
        + ") }}</call>{% endfor %}"
    )
    assert found.style == style


def test_what_begins_every_answer_is_no_part_of_calls() -> None:
    call = (
        EACH + "<call>{{ c.function.name }}={{ c.function.arguments | tojson }}</call>{% endfor %}"
    )
    optional = of(call, start="[answer]<think>\n\n</think>\n")
    assert (optional.prefix, optional.reasoning) == ("<call>", "optional")
    opened = of(call, prompt="<think>\n")
    assert (opened.prefix, opened.reasoning) == ("<call>", "open")


UNKNOWN = {
    "no calls": "",
    "tags for each argument": EACH
    + "<call={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}"
    "<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</call>{% endfor %}",
    "names in capitals": EACH
    + "<call>{{ c.function.name | upper }}{{ c.function.arguments | tojson }}</call>"
    "{% endfor %}",
    "names that change": EACH + "<call>{{ c.function.name }}{{ c.function.name | length }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_forms_get_the_generic_one(name: str) -> None:
    assert of(UNKNOWN[name]) is GENERIC


def test_a_format_writes_what_the_template_writes() -> None:
    source = (
        TURNS
        + "[answer]{{ m.content or '' }}"
        + EACH
        + '<call>\n{"name": {{ c.function.name | tojson }}, "arguments": '
        "{{ c.function.arguments | tojson }}}\n</call>{{ '\\n' if not loop.last }}{% endfor %}[/answer]"
        + REST
    )
    template = ChatTemplate(source, {})
    form = call_format(template)
    calls = [("first", {"a": 'é " {', "b": [1, {"c": None}]}), ("second_one", {})]
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": n, "arguments": a}}
            for n, a in calls
        ],
    }
    spans = template.render([message], generation_prompt=False)
    written = form.prefix + (form.between or "").join(
        name + form.middle + json.dumps(arguments, ensure_ascii=False) for name, arguments in calls
    )
    assert "".join(span.text for span in spans) == f"[answer]{written}{form.suffix}[/answer]"

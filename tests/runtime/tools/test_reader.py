"""Calls in a text that arrives in pieces of any size."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from lowtide.models.template.call_format import GENERIC, ID, CallFormat
from lowtide.runtime.tools.grammar import CallSyntax
from lowtide.runtime.tools.reader import CallReader

FORMS = {
    "generic": GENERIC,
    "one call": replace(GENERIC, between=None),
    "a list with ids": CallFormat(
        '[C][{"name": "',
        '", "arguments": ',
        f', "id": "{ID}"}}]',
        f', "id": "{ID}"}}, {{"name": "',
        id_length=9,
    ),
    "no marker": CallFormat('{"name": "', '", "parameters": ', "}", None),
    "plain": CallFormat("<f>", ":", "", "<f>"),
}
NAMES = ["get", "get_more", "x"]
Calls = list[tuple[str, dict[str, object]]]
ARGUMENTS: list[dict[str, object]] = [
    {},
    {"a": '}{\\"', "b": [1, {"c": []}]},
    {"text": "</tool_call> <tool_call> [C][ <f>get:{}"},
    {"é": "日本 😀\n"},
]


def written(form: CallFormat, calls: Calls) -> str:
    parts = [name + form.middle + json.dumps(arguments) for name, arguments in calls]
    text = form.prefix + (form.between or "").join(parts) + form.suffix
    return text.replace(ID, "abcdefgh1")


def read(form: CallFormat, text: str, chance: random.Random) -> tuple[str, Calls, list[str]]:
    reader, shown, calls, ids = (
        CallReader(CallSyntax(form, {}), NAMES),
        "",
        dict[int, list[str]](),
        [],
    )
    at = 0
    while at < len(text):
        size = chance.randint(1, 12)
        said, deltas = reader.push(text[at : at + size])
        at += size
        shown += said
        for delta in deltas:
            if delta.id is not None:
                assert delta.name is not None and delta.index == len(calls)
                calls[delta.index] = [delta.name, ""]
                ids.append(delta.id)
            calls[delta.index][1] += delta.arguments
    shown += reader.finish()
    return shown, [(name, json.loads(arguments)) for name, arguments in calls.values()], ids


@pytest.mark.parametrize("name", FORMS)
def test_calls_are_found_however_the_text_is_cut(name: str) -> None:
    form, chance = FORMS[name], random.Random(name)
    for _ in range(300):
        most = 3 if form.between is not None else 1
        calls: Calls = [
            (chance.choice(NAMES), chance.choice(ARGUMENTS)) for _ in range(chance.randint(1, most))
        ]
        before = chance.choice(["", "I look:\n", "a < b <"]) if form.trigger else ""
        shown, found, ids = read(form, before + written(form, calls), chance)
        assert found == calls
        assert shown == before.rstrip()
        assert len(set(ids)) == len(calls)
        assert all(len(one) == (form.id_length or 29) for one in ids)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "text",
    [
        "Hello.",
        " \n two  words \n",
        "<tool_call",
        "<tool_call>\nno json",
        '{"name": 5}',
        "[C]",
        "<f",
    ],
)
def test_what_is_no_call_stays_as_it_is(name: str, text: str) -> None:
    chance = random.Random(5)
    for _ in range(20):
        assert read(FORMS[name], text, chance)[:2] == (text, [])


def test_text_behind_calls_is_shown() -> None:
    text = (
        written(GENERIC, [("get", {})])
        + "\nThat is what I did, and it was a long way to go for it. " * 3
    )
    shown, found, _ = read(GENERIC, text, random.Random(1))
    assert found == [("get", {})]
    assert "long way" in shown and "tool_call" not in shown


def test_a_call_that_is_cut_has_the_arguments_so_far() -> None:
    reader = CallReader(CallSyntax(GENERIC, {}), NAMES)
    text = GENERIC.prefix + "get" + GENERIC.middle + '{"a": "hal'
    said, deltas = reader.push(text)
    assert said == "" and reader.finish() == ""
    assert "".join(delta.arguments for delta in deltas) == '{"a": "hal'

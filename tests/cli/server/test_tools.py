"""Tools over a real socket: choices, several calls, streams, history, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Serve = Callable[..., Any]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}


def written(*calls: tuple[str, dict[str, Any]]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


PARIS = ("get_weather", {"city": "Paris", "days": 2})
SUM = ("add", {"a": 1, "b": 2.5})


def test_a_call_comes_with_name_arguments_and_id(serving: Serve) -> None:
    server = serving("I shall look.\n" + written(PARIS), sequences=1)
    (choice,) = server.chat(tools=[WEATHER, ADD]).json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I shall look."
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == PARIS[1]
    assert call["id"].startswith("call_") and len(call["id"]) == 29
    prompt = server.model.tokenizer.decode(server.model._tokens)
    assert "Return the weather of a city." in prompt


def test_several_calls_have_ids_of_their_own(serving: Serve) -> None:
    server = serving(written(PARIS, SUM, PARIS))
    message = server.chat(tools=[WEATHER, ADD]).json["choices"][0]["message"]
    assert message["content"] is None
    names = [call["function"]["name"] for call in message["tool_calls"]]
    assert names == ["get_weather", "add", "get_weather"]
    assert len({call["id"] for call in message["tool_calls"]}) == 3
    alone = server.chat(tools=[WEATHER, ADD], parallel_tool_calls=False).json["choices"][0]
    assert len(alone["message"]["tool_calls"]) == 1


def test_a_stream_has_index_always_and_id_and_name_once(serving: Serve) -> None:
    events = serving("Hm. " + written(PARIS, SUM)).chat(tools=[WEATHER, ADD], stream=True).events
    deltas = [one["choices"][0]["delta"] for one in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Hm."
    parts = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert {part["index"] for part in parts} == {0, 1}
    for index, (name, arguments) in enumerate((PARIS, SUM)):
        mine = [part for part in parts if part["index"] == index]
        assert [part["function"].get("name") for part in mine if "id" in part] == [name]
        assert all("name" not in part["function"] and "type" not in part for part in mine[1:])
        assert json.loads("".join(part["function"]["arguments"] for part in mine)) == arguments
        assert len(mine) > 3
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_required_call_comes_from_a_model_that_would_say_something_else(
    serving: Serve, choice: Any
) -> None:
    tools = [WEATHER] if choice == "required" else [ADD, WEATHER]
    server = serving("No, I will not.", context=1024)
    reply = server.chat(tools=tools, tool_choice=choice, max_tokens=200)
    message = reply.json["choices"][0]
    assert message["finish_reason"] == "tool_calls"
    for call in message["message"]["tool_calls"]:
        assert call["function"]["name"] == "get_weather"
        assert isinstance(json.loads(call["function"]["arguments"])["city"], str)


def test_free_text_stays_text(serving: Serve) -> None:
    for text in ("It is warm.", "A <tool> and a <tool_cal", "1 < 2 {}", "\n spaced \n"):
        for tools in ({"tools": [WEATHER]}, {"tools": [WEATHER], "stream": True}):
            reply = serving(text).chat(**tools)
            if "stream" in tools:
                deltas = [one["choices"][0]["delta"] for one in reply.events]
                assert "".join(one.get("content", "") for one in deltas) == text
            else:
                assert reply.json["choices"][0]["message"]["content"] == text
                assert reply.json["choices"][0]["finish_reason"] == "stop"


def test_a_tool_that_there_is_not_cannot_be_called(serving: Serve) -> None:
    server = serving(written(("format_disk", {})), context=2048)
    reply = server.chat(tools=[WEATHER], max_tokens=150).json["choices"][0]
    names = [call["function"]["name"] for call in reply["message"].get("tool_calls", [])]
    assert set(names) <= {"get_weather"}


def test_results_in_the_history_reach_the_model(serving: Serve) -> None:
    server = serving(written(PARIS), "It is sunny.", sequences=1)
    message = server.chat(tools=[WEATHER]).json["choices"][0]["message"]
    messages = [
        {"role": "user", "content": "Hi"},
        message,
        {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny, 21"},
    ]
    for tools in ({"tools": [WEATHER]}, {}):
        body = {"messages": messages, "temperature": 0, **tools}
        answer = server.post("/v1/chat/completions", body).json["choices"][0]
        assert answer["message"]["content"] == "It is sunny."
        prompt = server.model.tokenizer.decode(server.model._tokens)
        assert "sunny, 21" in prompt and '"city": "Paris"' in prompt


def test_no_call_where_none_is_wanted(serving: Serve) -> None:
    server = serving("Hello.", sequences=1)
    reply = server.chat(tools=[WEATHER], tool_choice="none").json["choices"][0]
    assert reply["message"]["content"] == "Hello." and "tool_calls" not in reply["message"]
    assert "get_weather" not in server.model.tokenizer.decode(server.model._tokens)


def test_a_format_is_for_answers_that_call_nothing(serving: Serve) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answered = serving('{"ok": true}').chat(tools=[WEATHER], response_format=format)
    assert answered.json["choices"][0]["message"]["content"] == '{"ok": true}'
    called = serving(written(PARIS)).chat(tools=[WEATHER], response_format=format)
    assert called.json["choices"][0]["finish_reason"] == "tool_calls"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def tool_with(schema: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": schema}}
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such tool": (
        {"tool_choice": {"type": "function", "function": {"name": "fly"}}},
        "get_weather",
    ),
    "no such choice": ({"tool_choice": "maybe"}, "must be one of auto"),
    "a choice without tools": ({"tools": None, "tool_choice": "required"}, "needs tools"),
    "another kind": ({"tools": [{"type": "retrieval"}]}, "must be one of function"),
    "twice": ({"tools": [WEATHER, WEATHER]}, "two tools have the name get_weather"),
    "a bad name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "'a b'"),
    "a schema of no object": (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
            ]
        },
        "schema of an object",
    ),
    "a schema that cannot be enforced": (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "parameters": {
                            "type": "object",
                            "properties": {"x": {"type": "array", "uniqueItems": True}},
                        },
                    },
                }
            ]
        },
        "tool f",
    ),
    "nested too deeply": ({"tools": [tool_with(nested(400))]}, "tool f"),
    "a bound of more than 64 bits": (
        {"tools": [tool_with({"type": "integer", "minimum": -(2**63), "maximum": -(2**63) + 1})]},
        "minimum at ",
    ),
    "stop texts": ({"stop": ["x"]}, "stop"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tools_that_cannot_be_used_are_refused(serving: Serve, name: str) -> None:
    fields, text = REFUSED[name]
    reply = serving().chat(**{"tools": [WEATHER], **fields})
    assert reply.status == 400
    assert text in reply.error["message"], reply.error

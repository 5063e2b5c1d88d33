"""`/v1/responses` over a real socket: texts, calls, events in order, and nothing that is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Serve = Callable[..., Any]
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call>'
LOOK = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
}


def respond(server: Any, **fields: Any) -> Any:
    return server.post("/v1/responses", {"input": "Hi", "temperature": 0, **fields})


def events_of(reply: Any) -> list[dict[str, Any]]:
    parts = reply.body.decode().strip().split("\n\n")
    found = []
    for part in parts:
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    return found


def test_a_response(serving: Serve) -> None:
    server = serving("Hello.", sequences=1)
    answer = respond(server, instructions="Be brief.").json
    assert answer["object"] == "response" and answer["status"] == "completed"
    (message,) = answer["output"]
    assert message["content"][0]["text"] == "Hello."
    assert answer["usage"]["output_tokens"] == 6
    assert "Be brief." in server.model.tokenizer.decode(server.model._tokens)
    cut = respond(server, max_output_tokens=2).json
    assert cut["status"] == "incomplete"
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}


def test_events_come_in_order_and_end_with_the_whole(serving: Serve) -> None:
    events = events_of(respond(serving("Hello."), stream=True))
    kinds = [one["type"].removeprefix("response.") for one in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    deltas = [one["delta"] for one in events if one["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "Hello."
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello."


def test_calls_and_their_results(serving: Serve) -> None:
    server = serving(CALL, "It is wide.", sequences=1)
    (call,) = respond(server, tools=[LOOK]).json["output"]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call", "look", {"at": "sea"},
    )  # fmt: skip
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "wide, blue"}
    again = respond(server, tools=[LOOK], input=[{"role": "user", "content": "Hi"}, call, output])
    assert again.json["output"][0]["content"][0]["text"] == "It is wide."
    assert "wide, blue" in server.model.tokenizer.decode(server.model._tokens)
    events = events_of(respond(server, tools=[LOOK], stream=True))
    parts = [one["delta"] for one in events if one["type"].endswith("arguments.delta")]
    assert json.loads("".join(parts)) == {"at": "sea"} and len(parts) > 2
    assert events[-1]["response"]["output"][0]["name"] == "look"


def test_a_format(serving: Serve) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    text = {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": schema}}
    answer = respond(serving("no"), text=text, max_output_tokens=40).json
    assert isinstance(json.loads(answer["output"][0]["content"][0]["text"])["a"], int)


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "c"},
        {"input": []},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"include": ["reasoning.encrypted_content"]},
        {"truncation": "auto"},
        {"background": True},
        {"text": {"verbosity": "high"}},
        {"tools": [{"type": "web_search"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
    ],
)
def test_what_needs_a_memory_or_is_unknown_is_refused(
    serving: Serve, fields: dict[str, Any]
) -> None:
    reply = respond(serving(), **fields)
    assert reply.status == 400 and reply.error["param"]


def test_a_response_repeats_what_was_asked_of_tools(serving: Serve) -> None:
    server = serving("Hello.", sequences=1)
    named = {"type": "function", "name": "look"}
    for choice in ("auto", "none", "required", named):
        fields = {"tool_choice": choice, "parallel_tool_calls": False}
        answer = respond(server, tools=[LOOK], max_output_tokens=200, **fields).json
        assert (answer["tool_choice"], answer["parallel_tool_calls"]) == (choice, False)
        assert [tool["name"] for tool in answer["tools"]] == ["look"]

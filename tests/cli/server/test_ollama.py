"""ollama's paths over a real socket."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("starlette")

from lowtide.cli.server.ollama.answers import OllamaAnswer
from lowtide.runtime.serving.deltas import Answer, Call

Serve = Callable[..., Any]
MESSAGES = [{"role": "user", "content": "Hi"}]
GREEDY = {"temperature": 0}
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}


def lines(reply: Any) -> list[dict[str, Any]]:
    assert reply.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in reply.body.decode().splitlines()]


def test_chats_are_lines_of_json(serving: Serve) -> None:
    server = serving("Hello.")
    body = {"model": "fake:latest", "messages": MESSAGES, "options": GREEDY}
    *parts, last = lines(server.post("/api/chat", body))
    assert "".join(one["message"]["content"] for one in parts) == "Hello."
    assert not any(one["done"] for one in parts)
    assert last["done"] and last["done_reason"] == "stop" and last["eval_count"] == 6
    whole = server.post("/api/chat", {**body, "stream": False}).json
    assert whole["message"]["content"] == "Hello." and whole["prompt_eval_count"] > 0


def test_texts_with_and_without_the_template(serving: Serve) -> None:
    server = serving("Hello.", sequences=1)
    body = {"model": "fake", "prompt": "Hi\n", "stream": False, "options": GREEDY}
    assert server.post("/api/generate", {**body, "system": "Brief."}).json["response"] == "Hello."
    assert "Brief." in server.model.tokenizer.decode(server.model._tokens)
    assert server.post("/api/generate", {**body, "raw": True}).json["response"] == "Hello."
    assert "user" not in server.model.tokenizer.decode(server.model._tokens)


def test_options_and_formats(serving: Serve) -> None:
    server = serving("Hello.")
    body = {"messages": MESSAGES, "stream": False}
    short = server.post("/api/chat", {**body, "options": {**GREEDY, "num_predict": 3, "seed": 1}})
    assert (short.json["message"]["content"], short.json["done_reason"]) == ("Hel", "length")
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    options = {**GREEDY, "num_predict": 60}
    for format in ("json", schema):
        reply = server.post("/api/chat", {**body, "format": format, "options": options})
        assert isinstance(json.loads(reply.json["message"]["content"]), dict)


def test_calls_come_whole(serving: Serve) -> None:
    text = '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call>'
    server = serving(text)
    body = {"messages": MESSAGES, "tools": [LOOK], "options": GREEDY}
    calls = [one["message"].get("tool_calls") for one in lines(server.post("/api/chat", body))]
    (call,) = [one for found in calls if found for one in found]
    assert call["function"] == {"name": "look", "arguments": {"at": "sea"}}


def test_a_call_that_is_cut_is_left_out() -> None:
    """As where memory ran out: a client would run it with other arguments."""
    calls = [Call("1", "look", '{"at": "sea"}'), Call("2", "look", '{"at": "s')]
    for num_calls in (2, 1):
        answer = Answer(calls=calls[2 - num_calls :])
        found = OllamaAnswer("fake", is_chat=True).whole(answer)["message"].get("tool_calls", [])
        assert [call["id"] for call in found] == ["1"][: num_calls - 1]


def test_lists_of_models(serving: Serve) -> None:
    server = serving()
    (model,) = server.ask("GET", "/api/tags").json["models"]
    assert model["name"] == "fake" and model["details"]["family"] == "fake"
    assert server.post("/api/show", {"model": "fake"}).json["model_info"]["fake.context_length"]
    assert server.ask("GET", "/api/version").json["version"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"options": {"num_ctx": 1 << 20}}, "num_ctx is 1,048,576"),
        ({"options": {"mirostat": 1}}, "options.mirostat"),
        ({"model": "other"}, "ask for fake"),
        ({"format": "xml"}, "must be json"),
        ({"messages": [{"role": "user", "content": "x", "images": ["AA"]}]}, "images"),
        ({"template": "x"}, "--chat-template"),
        ({"keep_alive": 0}, "keep_alive is 0"),
        ({"keep_alive": "0s"}, "keep_alive is '0s'"),
        ({"keep_alive": "soon"}, "must be seconds"),
        ({"keep_alive": True}, "must be seconds"),
        ({"keep_alive": [5]}, "must be seconds"),
        ({"options": {"num_keep": 4}}, "options.num_keep"),
        ({"options": {"f16_kv": False}}, "--kv-type"),
        ({"options": {"vocab_only": True}}, "options.vocab_only"),
        ({"options": {"penalize_newline": True}}, "options.penalize_newline"),
        ({"shift": False}, "shift"),
    ],
)
def test_errors_have_ollamas_form(serving: Serve, fields: dict[str, Any], text: str) -> None:
    reply = serving().post("/api/chat", {"messages": MESSAGES, **fields})
    assert reply.status in (400, 404) and text in reply.json["error"]


@pytest.mark.parametrize("keep_alive", [-1, 300, 0.5, "5m", "1h30m", "-1s", "1.5h", None])
def test_times_for_which_the_model_stays_loaded(serving: Serve, keep_alive: Any) -> None:
    body = {"messages": MESSAGES, "options": GREEDY, "stream": False, "keep_alive": keep_alive}
    assert serving("Hello.").post("/api/chat", body).json["message"]["content"] == "Hello."


@pytest.mark.parametrize("messages", [5, True, "Hi", {"role": "user"}, [], [5], None])
def test_messages_that_are_no_list_of_messages(serving: Serve, messages: Any) -> None:
    reply = serving().post("/api/chat", {"messages": messages})
    assert reply.status == 400 and "messages" in reply.json["error"]

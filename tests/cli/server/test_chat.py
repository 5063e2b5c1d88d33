"""`/v1/chat/completions` over a real socket: whole answers, streams, and what is refused."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from servers import SlowModel, until

Serve = Callable[..., Any]
HALF = "\ud83d"
"""The first half of the two that UTF-16 writes an emoji with."""
USER_HALF = {"role": "user", "content": HALF}
MESSAGES = [{"role": "user", "content": "Hi"}]


def test_an_answer_has_openais_form(serving: Serve) -> None:
    reply = serving("Hello there.").chat(model="fake")
    answer = reply.json
    assert reply.status == 200
    assert answer["object"] == "chat.completion" and answer["model"] == "fake"
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "Hello there."
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_a_stream_says_the_same(serving: Serve) -> None:
    server = serving("Grüße 😀.")
    reply = server.chat(stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, last = reply.events
    assert all(one["object"] == "chat.completion.chunk" for one in [*events, last])
    assert all(one["usage"] is None for one in events)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [one["choices"][0]["delta"].get("content", "") for one in events]
    assert "".join(texts) == "Grüße 😀." and len(texts) > 5
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == len("Grüße 😀.".encode())


def test_stops_lengths_and_several_answers(serving: Serve) -> None:
    server = serving("one two three")
    stopped = server.chat(stop=[" three"]).json["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("one two", "stop")
    short = server.chat(max_completion_tokens=3, max_tokens=5).json["choices"][0]
    assert (short["message"]["content"], short["finish_reason"]) == ("one", "length")
    several = server.chat(n=3, max_tokens=3, seed=1, temperature=1).json
    assert [one["index"] for one in several["choices"]] == [0, 1, 2]
    assert several["usage"]["completion_tokens"] == 9


def test_streams_of_several_answers_have_their_numbers(serving: Serve) -> None:
    events = serving("abc").chat(n=2, stream=True).events
    for index in (0, 1):
        parts = [one["choices"][0] for one in events if one["choices"][0]["index"] == index]
        assert "".join(one["delta"].get("content", "") for one in parts) == "abc"
        assert parts[-1]["finish_reason"] == "stop"


def test_log_probabilities(serving: Serve) -> None:
    server = serving("ab")
    content = server.chat(logprobs=True, top_logprobs=2).json["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == ["a", "b"]
    assert [one["bytes"] for one in content] == [[97], [98]]
    assert all(one["top_logprobs"][0]["token"] == one["token"] for one in content)
    assert all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in content)
    events = server.chat(logprobs=True, stream=True).events
    scored = [one["choices"][0]["logprobs"] for one in events]
    assert sum(len(one["content"]) for one in scored if one) == 2
    assert server.chat().json["choices"][0]["logprobs"] is None


def test_a_bias_bans_a_token(serving: Serve) -> None:
    reply = serving("ab").chat(logit_bias={str(ord("a")): -100}, max_tokens=1)
    assert reply.json["choices"][0]["message"]["content"] != "a"


def test_messages_in_every_form_that_clients_send(serving: Serve) -> None:
    server = serving("Yes.", "Sure.", sequences=1)
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "Yes.", "refusal": None},
        {"role": "user", "content": "Again", "name": "Ann"},
    ]
    reply = server.post("/v1/chat/completions", {"messages": messages, "temperature": 0})
    assert reply.json["choices"][0]["message"]["content"] == "Sure."
    text = server.model.tokenizer.decode(server.model._tokens)
    assert "Be brief." in text and "a\nb" in text


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown field": ({"temprature": 1}, "temprature", "do you mean temperature?"),
    "audio": ({"audio": {}}, "audio", "text alone"),
    "other length of text": ({"verbosity": "low"}, "verbosity", "no such setting"),
    "refusal": (
        {"messages": [{"role": "assistant", "content": None, "refusal": "No."}]},
        "messages.0.refusal",
        "send it as the content",
    ),
    "old tools": ({"functions": []}, "functions", "tools"),
    "bad temperature": ({"temperature": -1}, "temperature", "temperature is -1"),
    "bad number": ({"top_p": "high"}, "top_p", "must be a number"),
    "bad length": ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    "bad bias": ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
    "bias beyond": ({"logit_bias": {"99999": 1}}, None, "99999"),  # type: ignore[dict-item]
    "too many answers": ({"n": 99}, "n", "from 1 to 16"),
    "no answer": ({"n": 0}, "n", "from 1"),
    "stream as text": ({"stream": "yes"}, "stream", "true or false"),
    "top without": ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    "unknown format": ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
    "no messages": ({"messages": []}, "messages", "at least one"),
    "bad role": ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "king"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0",
        "text alone",
    ),
    "part of a message": (
        {"messages": [{"role": "user", "content": "x", "colour": "red"}]},
        "messages.0.colour",
        "not known",
    ),
    "other model": ({"model": "gpt-9"}, "model", "ask for fake"),
    "too long": (
        {"messages": [{"role": "user", "content": "x" * 3000}]},
        None,
        "the context holds",
    ),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("stream", [False, True])
def test_what_would_change_an_answer_silently_is_refused_by_name(
    serving: Serve, stream: bool
) -> None:
    server = serving()
    for name, (fields, param, text) in REFUSED.items():
        reply = server.chat(**{"stream": stream, **fields})
        assert 400 <= reply.status < 500, name
        assert reply.error["param"] == param, name
        assert text in reply.error["message"], (name, reply.error)
        assert reply.error["type"] == "invalid_request_error"
    assert server.chat(user="u", store=True, metadata={"a": "b"}, service_tier="auto").status == 200


BODIES = {
    b"": "not JSON",
    b"{": "not JSON",
    b"[1]": "must be a JSON object",
    b'{"messages": NaN}': "NaN is no JSON number",
    b"[" * 10_000: "nested too deeply",
    b'{"a": "\xff"}': "not UTF-8",
    b'{"n": ' + b"9" * 5000 + b"}": "not JSON",
}


def test_bad_bodies_are_refused_in_a_sentence(serving: Serve) -> None:
    server = serving()
    for body, text in BODIES.items():
        reply = server.post("/v1/chat/completions", body)
        assert reply.status == 400 and text in reply.error["message"]
    assert server.chat().status == 200


@pytest.mark.parametrize(
    "fields",
    [
        {HALF: 1},
        {"stream_options": {HALF: 1}},
        {"messages": [{"role": "user", "content": "Hi", HALF: 1}]},
        {"model": HALF},
        {"tool_choice": HALF},
        {"stop": [HALF, 1]},
    ],
)
def test_an_error_may_quote_half_a_surrogate_pair(serving: Serve, fields: Any) -> None:
    """JSON's escapes can write it, but UTF-8 cannot."""
    reply = serving().post("/v1/chat/completions", {"messages": MESSAGES, **fields})
    assert reply.status in (400, 404) and reply.error["message"].isprintable()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/api/generate"])
def test_prompts_may_have_half_a_surrogate_pair(serving: Serve, path: str) -> None:
    body = {"prompt": HALF} if path != "/v1/chat/completions" else {"messages": [USER_HALF]}
    assert serving().post(path, body).status == 200


@pytest.mark.parametrize(
    "fields", [{"x" * 5000: 1}, {"model": "x" * 5000}, {"tool_choice": "x" * 5000}]
)
def test_errors_quote_no_long_text(serving: Serve, fields: Any) -> None:
    reply = serving().post("/v1/chat/completions", {"messages": MESSAGES, **fields})
    assert reply.status in (400, 404) and len(reply.body) < 500


def test_a_body_beyond_the_limit_is_refused(serving: Serve) -> None:
    server = serving(max_body_bytes=1000)
    reply = server.chat("x" * 2000)
    assert reply.status == 413 and reply.error["code"] == "body_too_large"
    chunked = iter([b"x" * 600, b"x" * 600])
    connection = server.connect()
    connection.request("POST", "/v1/chat/completions", chunked)
    assert connection.getresponse().status == 413
    connection.close()
    assert server.chat().status == 200


def test_a_client_that_leaves_ends_its_answer(serving: Serve) -> None:
    for stream in (False, True):
        model = SlowModel(["x" * 1000])
        server = serving(model=model)
        body = (
            b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1000, "stream": %s}'
        )
        data = body % (b"true" if stream else b"false")
        client = socket.create_connection(("127.0.0.1", server.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        until(lambda model=model: len(model.rows) > 20)
        client.close()
        time.sleep(0.3)
        computed = len(model.rows)
        time.sleep(0.3)
        assert len(model.rows) == computed < 500
        assert server.chat("Hi", max_tokens=2).status == 200

"""`/v1/completions` and `/v1/embeddings` over a real socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Serve = Callable[..., Any]


def complete(server: Any, prompt: Any = "Say:\n", **fields: Any) -> Any:
    return server.post("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})


def test_texts_are_continued_as_they_stand(serving: Serve) -> None:
    server = serving("one two")
    (choice,) = complete(server).json["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == (
        "one two",
        "stop",
        None,
    )
    assert complete(server, echo=True).json["choices"][0]["text"] == "Say:\none two"
    several = complete(server, ["a\n", "b\n"], n=2, seed=1).json
    assert [one["index"] for one in several["choices"]] == [0, 1, 2, 3]
    assert several["usage"]["completion_tokens"] == 4 * 7
    assert several["usage"]["prompt_tokens"] == 2 * 3


def test_a_stream_says_the_same(serving: Serve) -> None:
    server = serving("one two")
    events = complete(
        server, ["a\n", "b\n"], stream=True, stream_options={"include_usage": True}
    ).events
    assert events[-1]["usage"]["completion_tokens"] == 14 and events[-1]["choices"] == []
    for index in (0, 1):
        parts = [one["choices"][0] for one in events[:-1] if one["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == "one two"
        assert parts[-1]["finish_reason"] == "stop"


def test_log_probabilities_have_the_old_form(serving: Serve) -> None:
    found = complete(serving("ab"), logprobs=2).json["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "b"] and found["text_offset"] == [0, 1]
    assert len(found["top_logprobs"][0]) == 2 and "a" in found["top_logprobs"][0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "suffix": ({"suffix": "x"}, "at their end"),
    "tokens": ({"prompt": [1, 2]}, "send texts"),
    "nothing": ({"prompt": []}, "must be a text"),
    "best of": ({"best_of": 3}, "must equal n"),
    "echo and logprobs": ({"echo": True, "logprobs": 1}, "exclude each other"),
    "chat fields": ({"tools": []}, "for chats"),
    "unknown": ({"promt": "x"}, "do you mean prompt?"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(serving: Serve, name: str) -> None:
    fields, text = REFUSED[name]
    reply = complete(serving(), **fields)
    assert reply.status == 400 and text in reply.error["message"]


def test_embeddings_of_a_model_that_has_none_are_refused_in_a_sentence(serving: Serve) -> None:
    reply = serving().post("/v1/embeddings", {"input": "x"})
    assert 400 <= reply.status < 500 and "fake" in reply.error["message"]


@pytest.mark.parametrize(
    "body",
    [{"input": []}, {"input": [1]}, {"input": ""}, {"input": "x", "encoding_format": "int8"}, {}],
)
def test_bad_inputs_of_embeddings(serving: Serve, body: dict[str, Any]) -> None:
    assert serving().post("/v1/embeddings", body).status == 400

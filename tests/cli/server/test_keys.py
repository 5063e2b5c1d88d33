"""Where several keys are set, each has its own cache of prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Serve = Callable[..., Any]
TEXT = "A beginning that both clients send. " * 8


def cached(server: Any, key: str) -> int:
    """Send the text with a key; return how many of its tokens were cached."""
    messages = [{"role": "user", "content": TEXT}]
    body = {"messages": messages, "max_tokens": 2, "temperature": 0}
    reply = server.post("/v1/chat/completions", body, Authorization=f"Bearer {key}")
    assert reply.status == 200
    found: int = reply.json["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


@pytest.mark.parametrize("sequences", [1, 4])
def test_what_one_key_sent_is_not_cached_for_another(serving: Serve, sequences: int) -> None:
    server = serving(api_keys=("one", "two"), sequences=sequences)
    assert cached(server, "one") == 0
    assert cached(server, "one") > 200
    assert cached(server, "two") == 0
    assert cached(server, "two") > 200


@pytest.mark.parametrize("api_keys", [(), ("one",)])
def test_clients_with_the_same_key_share_the_cache(
    serving: Serve, api_keys: tuple[str, ...]
) -> None:
    server = serving(api_keys=api_keys)
    assert cached(server, "one") == 0
    assert cached(server, "one") > 200

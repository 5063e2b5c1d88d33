"""The page: it is one file that loads nothing, and its policy names exactly what it has."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from typing import Any

Serve = Callable[..., Any]


def test_the_page_is_served_with_a_policy_that_its_own_code_meets(serving: Serve) -> None:
    reply = serving().ask("GET", "/")
    assert reply.headers["content-type"].startswith("text/html")
    text, policy = reply.body.decode(), reply.headers["content-security-policy"]
    for tag in ("script", "style"):
        (code,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "default-src 'none'" in policy
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"", text)
    assert not re.findall(r"\son\w+=|\sstyle=|innerHTML", text)


def test_the_status_has_the_plan_and_the_queue(serving: Serve) -> None:
    server = serving("Hello.")
    server.chat()
    status = server.ask("GET", "/status").json
    plan = status["memory"]["plan"]
    assert sum(one["bytes"] for one in plan) == status["memory"]["planned_bytes"]
    assert status["queue"]["sequences"] == 4 and status["totals"]["tokens"]["generated"] == 6


def test_a_server_with_keys_shows_the_page_and_nothing_else(serving: Serve) -> None:
    server = serving(api_keys=("k",))
    assert server.ask("GET", "/").status == 200
    assert server.ask("GET", "/status").status == 401
    assert server.ask("GET", "/status", headers={"x-api-key": "k"}).json["needs_key"]

"""Who may use the server: hosts, origins, keys; and what happens where too much is asked."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from servers import SlowModel, until

from lowtide.cli.server.settings import ServerSettings, keys_of
from lowtide.models.errors import BadOption

Serve = Callable[..., Any]
BODY = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:99", "[::1]:80", "LOCALHOST:1"])
def test_names_of_this_machine_are_answered(serving: Serve, host: str) -> None:
    assert serving().ask("GET", "/v1/models", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "10.0.0.1", "", "localhost.evil"]
)
def test_other_names_are_refused(serving: Serve, host: str) -> None:
    reply = serving().ask("GET", "/v1/models", headers={"Host": host})
    assert reply.status == 421 and reply.error["code"] == "wrong_host"


def test_a_name_that_is_allowed(serving: Serve) -> None:
    server = serving(allowed_hosts=("box.example",))
    assert server.ask("GET", "/health", headers={"Host": "box.example:1"}).status == 200
    assert server.ask("GET", "/health", headers={"Host": "sub.box.example"}).status == 421


def test_pages_of_other_origins_are_refused_also_without_cors(serving: Serve) -> None:
    server = serving()
    foreign = server.post("/v1/chat/completions", BODY, Origin="http://evil.example")
    assert foreign.status == 403 and not server.model.rows
    assert server.post("/v1/chat/completions", BODY, Origin="null").status == 403
    own = server.post("/v1/chat/completions", BODY, Origin=f"http://127.0.0.1:{server.port}")
    assert own.status == 200 and "access-control-allow-origin" not in own.headers


@pytest.mark.parametrize("origin", ["http://[", "http://]", "//[::1", "", "\xff"])
def test_origins_that_are_no_urls_are_foreign(serving: Serve, origin: str) -> None:
    reply = serving().ask("GET", "/v1/models", headers={"Origin": origin})
    assert reply.status == 403 and reply.error["code"] == "foreign_origin"


def test_cors_is_for_the_origins_that_are_named(serving: Serve) -> None:
    server = serving(cors_origins=("http://page.example",))
    named = {"Origin": "http://page.example"}
    preflight = server.ask("OPTIONS", "/v1/chat/completions", headers=named)
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-origin"] == "http://page.example"
    answered = server.post("/v1/chat/completions", BODY, **named)
    assert answered.headers["access-control-allow-origin"] == "http://page.example"
    refused = server.ask("OPTIONS", "/v1/models", headers={"Origin": "http://other.example"})
    assert refused.status == 403 and "access-control-allow-origin" not in refused.headers


def test_keys(serving: Serve) -> None:
    server = serving(api_keys=("secret-1", "secret-2"))
    for headers in (
        {"Authorization": "Bearer secret-1"},
        {"authorization": "bearer secret-2"},
        {"x-api-key": "secret-1"},
    ):
        assert server.ask("GET", "/v1/models", headers=headers).status == 200
    for headers in (
        {},
        {"Authorization": "Bearer secret"},
        {"Authorization": "Basic secret-1"},
        {"x-api-key": "secret-1x"},
        {"Authorization": "Bearer \xe9"},
    ):
        reply = server.ask("GET", "/v1/models", headers=headers)
        assert reply.status == 401 and "secret" not in reply.error["message"]
        assert server.ask("GET", "/metrics", headers=headers).status == 401
    assert server.ask("GET", "/health").status == 200


def test_a_host_that_others_reach_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadOption, match="which others can reach"):
        ServerSettings(host="0.0.0.0")
    assert not ServerSettings(host="0.0.0.0", api_keys=("k",)).is_local
    assert ServerSettings(host="::1").is_local
    with pytest.raises(BadOption, match="every web page"):
        ServerSettings(cors_origins=("*",))
    monkeypatch.setenv("LOWTIDE_API_KEY", "a,b")
    assert keys_of(()) == ("a", "b") and keys_of(("c",)) == ("c",)


def test_a_full_queue_says_when_to_come_again(serving: Serve) -> None:
    server = serving(model=SlowModel(["x" * 300], context=2048), max_waiting=1, sequences=1)
    threads = [threading.Thread(target=server.chat, kwargs={"max_tokens": 150}) for _ in range(2)]
    threads[0].start()
    until(lambda: server.service.runtime.queue.running == 1)
    threads[1].start()
    until(lambda: server.service.runtime.queue.waiting == 1)
    for stream in (False, True):
        reply = server.chat(stream=stream)
        assert reply.status == 429 and reply.error["code"] == "queue_full"
        assert int(reply.headers["retry-after"]) >= 1
    assert server.ask("GET", "/health").status == 200
    for thread in threads:
        thread.join()
    assert server.chat(max_tokens=2).status == 200


def test_metrics_count_what_was_done_and_name_no_text(serving: Serve) -> None:
    server = serving("Hello.")
    server.chat("a secret question")
    server.chat(temprature=1)
    text = server.ask("GET", "/metrics").body.decode()
    assert 'lowtide_requests_total{path="/v1/chat/completions",status="200"} 1' in text
    assert 'lowtide_requests_total{path="/v1/chat/completions",status="400"} 1' in text
    assert 'lowtide_tokens_total{kind="generated"} 6' in text
    assert 'lowtide_answers_total{reason="stop"} 1' in text
    assert "lowtide_memory_planned_bytes{" in text
    assert "secret" not in text


def test_paths_and_methods_that_are_not_there(serving: Serve) -> None:
    server = serving()
    assert server.ask("GET", "/v1/nothing").error["code"] == "no_such_path"
    assert server.ask("GET", "/v1/chat/completions").status == 405
    assert server.ask("GET", "/v1/models/fake").json["id"] == "fake"
    assert server.ask("GET", "/v1/models/other").error["code"] == "model_not_found"


def test_bodies_have_few_values(serving: Serve) -> None:
    server = serving()
    for body in (b"[" + b"{}," * 20_000 + b"1]", b"[" + b'"a",' * 20_000 + b"1]"):
        reply = server.post("/v1/chat/completions", body)
        assert reply.status == 413 and "lists, objects and texts" in reply.error["message"]


def test_answers_that_nobody_reads_are_bounded(serving: Serve) -> None:
    """Each is a connection whose client sends a request and reads nothing."""
    server = serving("x" * 1500, context=2048, sequences=1, max_waiting=2)
    data = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": true, "max_tokens": 1500}'
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        % len(data)
    )
    clients = []
    for _ in range(12):
        client = socket.create_connection(("127.0.0.1", server.port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(head + data)
        clients.append(client)
    time.sleep(1)
    assert len(server.service._open) <= 5
    for client in clients:
        client.close()
    until(lambda: not server.service._open)
    assert server.chat(max_tokens=2).status == 200


def test_a_client_that_leaves_at_once_leaves_nothing_behind(serving: Serve) -> None:
    server = serving(model=SlowModel(["x" * 500], context=2048))
    data = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        % len(data)
    )
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head + data)
    until(lambda: not server.service._open and server.service.runtime.queue.running == 0)

"""Clients that send slowly, too much, or no HTTP, and what running answers see of a stop."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from servers import SlowModel, until

from lowtide.cli.server import connection
from lowtide.cli.server.reading import body

Serve = Callable[..., Any]
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def whole_answer(client: socket.socket) -> tuple[int, Any]:
    """Read until the server closes; a reset raises."""
    data = b""
    while piece := client.recv(1 << 16):
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), json.loads(rest) if rest else None


def sent(server: Any, data: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    client.sendall(data)
    return client


@pytest.mark.parametrize("pieces", [[b"POST /v1"], [HEAD, b"A: b\r\n"]])
def test_a_head_that_comes_slowly_ends_the_connection(
    serving: Serve, monkeypatch: pytest.MonkeyPatch, pieces: list[bytes]
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    server = serving()
    with sent(server, b"") as client:
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.1)
        status, answer = whole_answer(client)
    assert status == 408 and answer["error"]["code"] == "timeout"
    assert server.chat(max_tokens=2).status == 200


def test_a_connection_that_sends_nothing_is_closed(
    serving: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with sent(serving(), b"") as client:
        assert client.recv(1) == b""


def test_bytes_in_between_do_not_move_the_deadline(
    serving: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.6)
    began = time.monotonic()
    with sent(serving(), b"GET /health HTTP/1.1\r\n") as client:
        client.settimeout(0.1)
        data = b""
        while time.monotonic() < began + 10:
            try:
                data = client.recv(4096)
                break
            except TimeoutError:
                client.sendall(b"X")
    assert data.startswith(b"HTTP/1.1 408 ") and time.monotonic() < began + 5


def test_a_body_that_comes_slowly_is_answered(
    serving: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "BODY_SECONDS", 0.3)
    with sent(serving(), HEAD + b"Content-Length: 100\r\n\r\n{") as client:
        status, answer = whole_answer(client)
    assert status == 408 and answer["error"]["code"] == "timeout"


def test_a_body_that_nobody_reads_ends_too(serving: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REST_SECONDS", 0.3)
    with sent(
        serving(), b"POST /no HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
    ) as one:
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := one.recv(4096):  # it times out where the connection stays open
                answer += part
        assert b" 404 " in answer.split(b"\r\n")[0]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_client_with_too_large_a_body_reads_the_refusal(serving: Serve, is_chunked: bool) -> None:
    """It sends all of its body before it reads, as most do."""
    server = serving(max_body_bytes=1 << 16)
    size = 8 << 20
    if is_chunked:
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + piece * (size >> 16) + b"0\r\n\r\n"
    else:
        data = HEAD + b"Content-Length: %d\r\n\r\n" % size + b"x" * size
    for _ in range(3):
        with sent(server, data) as client:
            status, answer = whole_answer(client)
        assert status == 413 and answer["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", HEAD + b"A: " + b"x" * 200_000 + b"\r\n\r\n"],
)
def test_what_is_no_http_is_refused_in_the_form_of_errors(serving: Serve, data: bytes) -> None:
    with sent(serving(), data + b"\r\n\r\n") as client:
        status, answer = whole_answer(client)
    assert status == 400 and answer["error"]["code"] == "invalid_http"


def test_too_many_connections_are_refused_in_the_form_of_errors(serving: Serve) -> None:
    server = serving(max_connections=3)
    clients = [sent(server, b"") for _ in range(3)]
    time.sleep(0.3)
    with sent(server, HEAD + b"\r\n") as client:
        status, answer = whole_answer(client)
    assert status == 503 and answer["error"]["code"] == "too_many_connections"
    for one in clients:
        one.close()
    time.sleep(0.3)
    assert server.chat(max_tokens=2).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_tells_answers_that_run_too_long(
    serving: Serve, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server = serving(model=SlowModel(["x" * 1900], context=2048), shutdown_seconds=1)
    replies: list[Any] = []
    asking = threading.Thread(
        target=lambda: replies.append(server.chat(stream=stream, max_tokens=1900))
    )
    with caplog.at_level(logging.WARNING):
        asking.start()
        until(lambda: server.service.runtime.queue.running == 1)
        began = time.monotonic()
        server._serving.stop()
        asking.join()
        server._thread.join()
    assert time.monotonic() - began < 4
    assert not caplog.records
    if stream:
        assert replies[0].status == 200
        assert b'"code":"server_stops"' in replies[0].body and b"[DONE]" not in replies[0].body
    else:
        assert replies[0].status == 503 and replies[0].error["code"] == "server_stops"

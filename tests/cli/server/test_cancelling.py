"""A client that leaves ends its answer: the pass that runs when it leaves is the last one, by counts."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from servers import GatedModel, Server, until

from lowtide.cli.server import streaming

Serve = Callable[..., Server]
LONG = "word " * 100 + "\n"
PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": LONG}], "temperature": 0},
    "/v1/completions": {"prompt": LONG, "temperature": 0},
    "/v1/responses": {"input": LONG, "temperature": 0},
    "/api/chat": {
        "messages": [{"role": "user", "content": LONG}],
        "options": {"temperature": 0},
    },
}


def send(server: Server, path: str, *, stream: bool, **fields: Any) -> socket.socket:
    """Send a request and read nothing."""
    data = json.dumps({**PATHS[path], "stream": stream, **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    client.sendall(head.encode() + data)
    return client


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_passes", [1, 3, 40])
def test_the_pass_that_runs_is_the_last(
    serving: Serve,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    stream: bool,
    sequences: int,
    num_passes: int,
) -> None:
    """The prompt is read in ten passes or more: the client leaves in one of those, or while tokens come."""
    monkeypatch.setattr(streaming, "PATIENCE_S", 60)  # the server does not wait for the first token
    model = GatedModel(["x" * 500], context=2048, batch_size=32)
    server = serving(model=model, sequences=sequences)
    gate = model.gate
    client = send(server, path, stream=stream)
    gate.open(num_passes)
    until(lambda: gate.num_begun == num_passes + 1)  # one pass more is begun, and waits
    client.close()
    until(lambda: not server.service._open)
    gate.open(1000)
    until(lambda: server.service.runtime.queue.running == 0)
    assert gate.num_begun == num_passes + 1
    assert server.chat(max_tokens=2).status == 200  # and the next answer is computed as ever


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_waits_is_never_begun(serving: Serve, stream: bool) -> None:
    model = GatedModel(["x" * 500], context=2048, batch_size=512)
    server = serving(model=model, sequences=1)
    runs = send(server, "/v1/completions", stream=False, max_tokens=6)
    until(lambda: model.gate.num_begun == 1)
    waits = send(server, "/v1/completions", stream=stream, max_tokens=500)
    until(lambda: server.service.runtime.queue.waiting == 1)
    waits.close()
    until(lambda: server.service.runtime.queue.waiting == 0)
    model.gate.open(1000)
    until(lambda: not server.service._open)
    assert model.gate.num_begun == 7 - 1  # the prompt, and a pass for each token but the last
    runs.close()


def test_the_others_go_on(serving: Serve) -> None:
    """Beside an answer that is read, one that nobody reads any more is in no later pass."""
    model = GatedModel(["x" * 500], context=2048, batch_size=512)
    server = serving(model=model, sequences=4)
    read = send(server, "/v1/completions", stream=False, max_tokens=30, prompt="One\n")
    until(lambda: model.gate.num_begun == 1)
    left = send(server, "/v1/completions", stream=True, max_tokens=500, prompt="Two\n")
    until(lambda: server.service.runtime.queue.waiting == 1)
    model.gate.open(10)
    until(lambda: model.gate.num_begun == 11)
    left.close()
    until(lambda: len(server.service._open) == 1)
    model.gate.open(1000)
    reply = read.makefile("rb").read(15)
    assert reply == b"HTTP/1.1 200 OK"
    decoding = model.rows[2:]
    assert decoding[:9] == [2] * 9  # both, the pass that ran when the client left included
    assert set(decoding[9:]) == {1}
    read.close()

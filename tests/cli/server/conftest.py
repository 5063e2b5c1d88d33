"""`serving` starts a server over a fake model, on a real socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")

from servers import Server

from lowtide import FakeModel, Runtime, SamplingParams
from lowtide.cli.server.service import Service
from lowtide.cli.server.settings import ServerSettings


@pytest.fixture
def serving() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(
        *replies: str,
        context: int = 2048,
        max_waiting: int = 8,
        sequences: int = 4,
        model: FakeModel | None = None,
        **settings: Any,
    ) -> Server:
        model = model or FakeModel(replies or ("Hello.",), context=context)
        runtime = Runtime.open(model, memory="8GiB", sequences=sequences, max_waiting=max_waiting)
        service = Service(
            runtime, "fake", SamplingParams(), ServerSettings(**{"port": 0, **settings})
        )
        servers.append(Server(service, model))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()

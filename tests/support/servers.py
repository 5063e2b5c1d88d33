"""A server of tests over a real socket, and a client without any library."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lowtide import FakeModel
from lowtide.cli.server.app import make_app
from lowtide.cli.server.run import Serving, listening_socket
from lowtide.cli.server.service import Service
from lowtide.models.fake_model import FakeSequences
from lowtide.models.model import SequenceSlice


@dataclass
class Reply:
    """A whole answer over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json["error"])

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events, without [DONE]."""
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


class Server:
    """A server that runs in a thread of the test."""

    def __init__(self, service: Service, model: FakeModel) -> None:
        self.service, self.model = service, model
        listening = listening_socket(service.settings)
        self.port = listening.getsockname()[1]
        self._serving = Serving(make_app(service), service.settings, listening, service.end_answers)
        self._thread = threading.Thread(target=self._serving.run)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.ask("POST", path, body, headers)

    def chat(self, text: str = "Hi", **fields: Any) -> Reply:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"messages": messages, "temperature": 0, **fields})

    def stop(self) -> None:
        self._serving.stop()
        self._thread.join()
        self.service.runtime.close()


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


class Gate:
    """Lets so many passes through as `open` says, and counts those that were begun."""

    def __init__(self) -> None:
        self._places = threading.Semaphore(0)
        self.num_begun = 0

    def pass_through(self) -> None:
        self.num_begun += 1
        assert self._places.acquire(timeout=30), "nobody opened the gate"

    def open(self, num_passes: int) -> None:
        self._places.release(num_passes)


class GatedSequences(FakeSequences):
    """Begin a pass and wait until the gate is open for it."""

    def __init__(self, model: GatedModel, *arguments: int) -> None:
        super().__init__(model, *arguments)
        self._gate = model.gate

    def forward(self, slices: Sequence[SequenceSlice]) -> Any:
        self._gate.pass_through()
        return super().forward(slices)


class GatedModel(FakeModel):
    """Begins a pass and waits until the gate is open for it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.gate = Gate()

    def open_sequences(
        self, num_sequences: int, num_slots: int, max_logits: int | None = None
    ) -> GatedSequences:
        return GatedSequences(self, num_sequences, num_slots, max_logits or num_sequences)

    def forward(self, token_ids: Sequence[int]) -> Any:
        self.gate.pass_through()
        return super().forward(token_ids)


class SlowSequences(FakeSequences):
    """Take a hundredth of a second for a pass."""

    def forward(self, slices: Sequence[SequenceSlice]) -> Any:
        time.sleep(0.01)
        return super().forward(slices)


class SlowModel(FakeModel):
    """Takes a hundredth of a second for a pass."""

    def open_sequences(
        self, num_sequences: int, num_slots: int, max_logits: int | None = None
    ) -> SlowSequences:
        return SlowSequences(self, num_sequences, num_slots, max_logits or num_sequences)

    def forward(self, token_ids: Sequence[int]) -> Any:
        time.sleep(0.01)
        return super().forward(token_ids)

"""`lowtide serve` under load: random requests, clients that leave, bodies too large, JSON that is broken.

`LOAD_SECONDS` says how long each budget is loaded (10 seconds by default). Every whole answer that says `identical`
must be the one that the same request got alone, and resident memory must stay inside `--memory`. At the end nothing
runs or waits.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from serve_process import Process, started

pytestmark = [pytest.mark.slow, pytest.mark.real]

SECONDS = float(os.environ.get("LOAD_SECONDS", "10"))
BUDGETS_MIB = (160, 175, 190, 210, 240, 300)
NUM_CLIENTS = 24
CONTEXT = 1024
MAX_BODY = 300_000
WORDS = "tide moon sea salt boat harbour wind rope sail net".split()


def requests() -> list[dict[str, Any]]:
    """Return requests whose answers are computed alone first."""
    chance = random.Random(7)
    made = []
    for length in (1, 2, 5, 12, 40, 120):
        text = " ".join(chance.choices(WORDS, k=length))
        for max_tokens in (1, 9):
            messages = [{"role": "user", "content": f"Tell of {text}."}]
            made.append({"messages": messages, "max_tokens": max_tokens, "temperature": 0})
    return made


class Load:
    """Clients that ask one server at the same time, and what they got."""

    def __init__(self, server: Process, seconds: float) -> None:
        self._server, self._end = server, time.monotonic() + seconds
        self._bodies = requests()
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[Any] = []
        self._alone = [self._text(self._ask(body)) for body in self._bodies]
        self._end = time.monotonic() + seconds

    def _ask(self, body: Any, timeout: float = 120) -> tuple[int, bytes]:
        status, data = self._server.post("/v1/chat/completions", body, timeout=timeout)
        return status, data

    def _text(self, reply: tuple[int, bytes]) -> str:
        assert reply[0] == 200, reply
        text: str = json.loads(reply[1])["choices"][0]["message"]["content"]
        return text

    def run(self) -> None:
        """Ask until the time is up."""
        clients = [threading.Thread(target=self._client, args=(i,)) for i in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def _client(self, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < self._end:
            try:
                self._one(chance)
            except Exception as error:
                self.wrong.append(repr(error))
                return

    def _one(self, chance: random.Random) -> None:
        kind = chance.choice(["whole", "whole", "whole", "left", "too large", "broken"])
        i = chance.randrange(len(self._bodies))
        if kind == "whole":
            reply = self._ask(self._bodies[i])
            if reply[0] == 200 and self._text(reply) != self._alone[i]:
                if not json.loads(reply[1])["lowtide"]["identical"]:
                    self.counts["other answer, not promised"] += 1
                    return
                self.wrong.append((self._bodies[i], self._text(reply), self._alone[i]))
            self._count(kind, reply[0], {200, 429})
            if reply[0] == 429:
                time.sleep(chance.uniform(0.05, 0.3))
        elif kind == "left":
            stream = chance.random() < 0.5
            body = {**self._bodies[i], "max_tokens": 200, "stream": stream}
            with contextlib.suppress(urllib.error.URLError):
                self._ask(body, timeout=chance.uniform(0.02, 0.5))
            self.counts[kind] += 1
        elif kind == "too large":
            self._count(kind, self._ask(b"[" + b" " * MAX_BODY + b"]")[0], {413})
        else:
            data = json.dumps(self._bodies[i]).encode()
            broken = data[: chance.randrange(1, len(data) - 1)]
            self._count(kind, self._ask(broken)[0], {400})

    def _count(self, kind: str, status: int, allowed: set[int]) -> None:
        self.counts[f"{kind} {status}"] += 1
        if status not in allowed:
            self.wrong.append((kind, status))


@pytest.mark.parametrize("budget_mib", BUDGETS_MIB)
def test_answers_and_memory_under_load(smollm2: Path, budget_mib: int) -> None:
    options = ("--memory", f"{budget_mib}MiB", "--context", str(CONTEXT), "--max-body", "262144")
    with started(smollm2, *options) as server:
        load = Load(server, SECONDS)
        load.run()
        peak_mib = server.peak_bytes / (1 << 20)
        sequences = server.status()["queue"]["sequences"]
        print(f"\n{budget_mib} MiB, {sequences} together: peak {peak_mib:.1f}", dict(load.counts))
        assert not load.wrong, load.wrong[:3]
        assert peak_mib <= budget_mib
        assert {"whole 200", "left", "too large 413", "broken 400"} <= set(load.counts)
        end = time.monotonic() + 30
        while server.status()["queue"]["running"] or server.status()["queue"]["waiting"]:
            assert time.monotonic() < end, "answers that nobody reads are still computed"
            time.sleep(0.1)
        assert server.stop() == 0
        assert not any("Traceback" in line or "harbour" in line for line in server.lines)

"""`lowtide serve` as typed, with a real model and real clients: memory, answers, signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serve_process import RUN, started

WORDS = "why is the sea salty and how deep does it go before the light ends".split()


def random_request(chance: random.Random) -> tuple[str, Any, float]:
    """Return a path, a body, and how long the client waits for the answer."""
    text = " ".join(chance.choices(WORDS, k=chance.choice([3, 20, 200, 3000])))
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": chance.choice([1, 8, 40]),
        "stream": chance.random() < 0.5,
    }
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    kind = chance.randrange(8)
    if kind == 0:
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    elif kind == 1:
        body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        body["tool_choice"] = chance.choice(["auto", "required"])
    elif kind == 2:
        body.update(logprobs=True, top_logprobs=20, n=2)
    elif kind == 3:
        return "/v1/chat/completions", b"[" * chance.choice([10, 100_000]), 60
    elif kind == 4:
        return "/v1/embeddings", {"input": [text] * 3}, 60
    elif kind == 5:
        return "/v1/completions", b'{"prompt": "' + b"x" * 300_000 + b'"}', 60
    return "/v1/chat/completions", body, chance.choice([0.1, 60, 60])


@pytest.mark.real
def test_random_requests_stay_inside_the_budget(smollm2: Path) -> None:
    with started(smollm2, "--memory", "230MiB", "--context", "1024") as server:
        statuses: list[int] = []

        def work(seed: int) -> None:
            chance, end = random.Random(seed), time.monotonic() + 8
            while time.monotonic() < end:
                path, body, timeout = random_request(chance)
                statuses.append(server.post(path, body, timeout=timeout)[0])

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(10)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert server.peak_bytes <= 230 << 20
        assert statuses.count(200) > 2
        assert set(statuses) <= {0, 200, 400, 413, 429, 503}
        assert server.stop() == 0
        assert not any("Traceback" in line or "salty" in line for line in server.lines)


@pytest.mark.real
def test_answers_are_those_of_the_runtime(smollm2: Path, real_runtime: Any) -> None:
    messages = [{"role": "user", "content": "Why is the sea salty?"}]
    expected = "".join(
        chunk.text for chunk in real_runtime.chat(messages, temperature=0, max_tokens=24)
    )
    body = {"messages": messages, "temperature": 0, "max_tokens": 24}
    with started(smollm2, "--context", "1024", "--sequences", "1") as server:
        for _ in range(2):
            _, answer = server.post("/v1/chat/completions", body)
            assert json.loads(answer)["choices"][0]["message"]["content"] == expected


@pytest.mark.real
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_running_answer_end(smollm2: Path, number: int) -> None:
    with started(smollm2, "--context", "1024") as server:
        replies: list[tuple[int, bytes]] = []
        body = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 24}
        asking = threading.Thread(
            target=lambda: replies.append(server.post("/v1/chat/completions", body))
        )
        asking.start()
        while not server.status()["queue"]["running"]:
            time.sleep(0.01)
        assert server.stop(number) == 0
        asking.join()
        assert replies[0][0] == 200


def test_a_host_that_others_reach_is_refused_without_a_key() -> None:
    environment = {**os.environ, "LOWTIDE_API_KEY": ""}
    command = [sys.executable, "-c", RUN, "serve", "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "set --api-key" in done.stderr
    assert "Traceback" not in done.stderr

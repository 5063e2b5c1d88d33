"""A worker for measurements under load: open a model as a user does, wait for a line, answer, say what it took.

Its argument is JSON: `model`, `options` (of Runtime.open), `prompt_tokens`, `tokens`. It writes "ready", and then
one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

from lowtide import Runtime

TEXT = "The tide comes in, the tide goes out, and nobody on the shore knows what it is about. "


def prompt_of(runtime: Runtime, num_tokens: int) -> str:
    """Return a text of that many tokens."""
    tokenizer = runtime._model.tokenizer
    ids = tokenizer.encode(TEXT * (num_tokens // 16 + 2), add_special=True, parse_special=False)
    return tokenizer.decode(ids[:num_tokens])


def measure(runtime: Runtime, num_tokens: int, max_tokens: int) -> dict[str, Any]:
    """Answer once; times are those that a reader of the stream sees."""
    text = prompt_of(runtime, num_tokens)
    cpu, started = time.process_time(), time.perf_counter()
    times, chunks = list[float](), list[Any]()
    for chunk in runtime.stream(text, max_tokens=max_tokens, temperature=0):
        times.append(time.perf_counter())
        chunks.append(chunk)
    pauses = [b - a for a, b in pairwise(times)]
    stats = chunks[-1].stats
    found = {
        "first_token_s": times[0] - started,
        "token_ids": [chunk.token_id for chunk in chunks],
        "cpu_s": time.process_time() - cpu,
        "threads": stats.to_dict().get("threads"),
    }
    if pauses:
        found |= {
            "tokens_per_s": len(pauses) / (times[-1] - times[0]),
            "median_pause_s": statistics.median(pauses),
            "p99_pause_s": sorted(pauses)[int(0.99 * (len(pauses) - 1))],
            "longest_pause_s": max(pauses),
        }
    return found


def main() -> None:
    """Open, wait, measure, and write the result."""
    request = json.loads(sys.argv[1])
    with Runtime.open(request["model"], **request["options"]) as runtime:
        list(runtime.stream("Hello", max_tokens=2, temperature=0))
        print("ready", flush=True)
        sys.stdin.readline()
        found = measure(runtime, request["prompt_tokens"], request["tokens"])
        print(json.dumps(found), flush=True)
        sys.stdin.readline()
    os._exit(0)


if __name__ == "__main__":
    main()

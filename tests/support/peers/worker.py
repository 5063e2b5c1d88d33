"""One engine in a process of its own: reads prompts and decodes when it is asked, and says how long each took.

Its arguments are the name of an engine, a model, and the context. Each line of its input is JSON with `token_ids`
and `tokens`; each answer is JSON with `prompt_s`, the seconds until the first token, `token_s`, the median seconds
of a later token, and `peak_bytes` of the process so far. This file runs in the peers' environment, where lowtide is
not installed, too.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

THREADS = 2
PAUSE_S = 0.3


class Engine(Protocol):
    """What a file of this folder defines."""

    def answer(self, token_ids: list[int], tokens: int) -> list[float]:
        """Read a prompt into an empty cache and decode greedily; return the time at which each token was there."""
        ...


def peak_bytes() -> int:
    """Return the peak of this process's resident memory; getrusage counts what its parent had at the start."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measured(engine: Engine, token_ids: list[int], tokens: int) -> dict[str, float]:
    """Answer once, when the other engines' threads have stopped to spin."""
    time.sleep(PAUSE_S)
    started = time.perf_counter()
    times = engine.answer(token_ids, tokens)
    return {
        "prompt_s": times[0] - started,
        "token_s": statistics.median(b - a for a, b in pairwise(times)),
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    """Open the engine, write "ready", and answer each line."""
    name, model, context = sys.argv[1:4]
    out = sys.stdout
    sys.stdout = sys.stderr  # engines write there
    engine: Any = importlib.import_module(f"peers.{name}").open_engine(Path(model), int(context))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        found = measured(engine, request["token_ids"], request["tokens"])
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()

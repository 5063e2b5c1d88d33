"""A busy machine: decoding and first tokens beside other work, as a share of the idle machine's.

Every figure is of a fresh process with lowtide's own settings. The conditions alternate, so that drifts of the machine
meet all of them; figures are medians of the rounds. `BUSY_OPTIONS` is a JSON object of options of `Runtime.open`,
`BUSY_CONDITIONS` some of the conditions, `BUSY_ROUNDS` a number, `BUSY_JSON` a file to append to.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from load import answer, begin, computing, decoding_llama, lost_time, prepared

pytestmark = pytest.mark.benchmark

WORKER = "steady_worker.py"
OPTIONS = {"attention": "dense", "repack": True, "memory": "2GiB", "context": 2048}
LOADS: dict[str, Callable[[Path], AbstractContextManager[object]]] = {
    "idle": lambda _: contextlib.nullcontext(),
    "1 busy": lambda _: computing(1),
    "2 busy": lambda _: computing(2),
    "beside llama.cpp": decoding_llama,
}


def request_of(model: Path, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    options = json.loads(os.environ.get("BUSY_OPTIONS", "null")) or OPTIONS
    options = {k: v for k, v in options.items() if v is not None}
    return {
        "model": str(model),
        "options": options,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
    }


def under(load: str, model: Path, request: dict[str, Any]) -> dict[str, Any]:
    with prepared(WORKER, request) as process, LOADS[load](model):
        begin(process)
        return answer(process)


def side_by_side(model: Path, request: dict[str, Any]) -> dict[str, Any]:
    with prepared(WORKER, request) as one, prepared(WORKER, request) as other:
        begin(one)
        begin(other)
        found = [answer(one), answer(other)]
    total = sum(f["tokens_per_s"] for f in found)
    return {**found[0], "tokens_per_s": total}


def median_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name, value in found[0].items() if isinstance(value, float)]
    return {name: statistics.median(f[name] for f in found) for name in names}


def test_busy_machine(smollm2: Path) -> None:
    rounds = int(os.environ.get("BUSY_ROUNDS", "3"))
    request = request_of(smollm2, 256, 160)
    conditions = os.environ.get("BUSY_CONDITIONS", ",".join([*LOADS, "two lowtides"])).split(",")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in conditions}
    lost = lost_time()
    for _ in range(rounds):
        for name in conditions:
            if name == "two lowtides":
                found[name].append(side_by_side(smollm2, request))
            else:
                found[name].append(under(name, smollm2, request))
    print(
        f"\nmachine alone: loses {lost[0]:.1%} of its time, longest pause {lost[1] * 1000:.1f} ms"
    )
    idle = median_of(found[conditions[0]])
    for name in conditions:
        m = median_of(found[name])
        speeds = " ".join(f"{f['tokens_per_s']:.0f}" for f in found[name])
        print(
            f"{name:17} {m['tokens_per_s']:6.1f} tokens/s ({m['tokens_per_s'] / idle['tokens_per_s']:.2f} of idle; "
            f"{speeds}), first token {m['first_token_s']:.3f} s ({m['first_token_s'] / idle['first_token_s']:.2f} x), "
            f"pause {m['median_pause_s'] * 1000:.1f} ms, p99 {m['p99_pause_s'] / m['median_pause_s']:.1f} x, "
            f"CPU {m['cpu_s']:.2f} s, threads {found[name][-1]['threads']}"
        )
    if "BUSY_JSON" in os.environ:
        with open(os.environ["BUSY_JSON"], "a") as file:
            print(json.dumps({"request": request, "found": found}), file=file)
    first = found[conditions[0]][0]["token_ids"]
    assert all(f["token_ids"] == first for fs in found.values() for f in fs), "answers differ"

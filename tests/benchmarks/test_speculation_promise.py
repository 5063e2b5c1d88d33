"""What the plan promises of speculation against what comes of it, by kind of prompt, and what drafting takes.

Run with `make bench`. LOWTIDE_PROMPTS names a file of prompts, as in `test_speculation.py`. For each kind the first
prompts are a user's earlier conversations: their acceptance is counted and kept. Then the model is opened again, and
the other prompts are compared with the promise of its plan.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from prompts_file import prompts_by_kind

from lowtide import Runtime

pytestmark = pytest.mark.benchmark
OPTIONS: dict[str, Any] = {
    "memory": "4GiB",
    "context": 2048,
    "threads": int(os.environ.get("LOWTIDE_THREADS", "2")),
    "attention": "dense",
    "repack": True,
    "speculate": "auto",
}
MAX_TOKENS = 96
NUM_EARLIER = 2
"""Prompts of each kind that are counted before."""
ENOUGH = 0.10
"""How far the promise may be from what comes."""


def answered(runtime: Runtime, prompts: list[str]) -> list[tuple[float, float, dict[str, Any]]]:
    """Return for each prompt the seconds of decoding, the tokens, and the statistics of speculation."""
    found = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        options: dict[str, Any] = {"temperature": 0, "overflow": "drop-oldest"}
        chunks = list(runtime.chat(messages, max_tokens=MAX_TOKENS, **options))
        stats = chunks[-1].stats
        assert stats.speculation is not None
        found.append((stats.decode_s, stats.generated_tokens, stats.speculation))
    return found


def test_the_promise_and_what_came(benchmark: Any, smollm2: Path, tmp_path: Path) -> None:
    kinds = prompts_by_kind(per_kind=3)
    ratios: dict[str, float] = {}
    shares: dict[str, float] = {}

    def ask() -> None:
        for kind, prompts in kinds.items():
            for counted in (tmp_path / "calibrations").glob("acceptance-*.json"):
                counted.unlink()
            with Runtime.open(smollm2, **OPTIONS) as runtime:
                answered(runtime, prompts[:NUM_EARLIER])
            with Runtime.open(smollm2, **OPTIONS) as runtime:
                table = runtime.plan.speculation
                assert table is not None
                promised = table.chosen.speed_up if table.chosen else 1.0
                answers = answered(runtime, prompts[NUM_EARLIER:])
            plain_s = sum(s * (stats["measured_speedup"] or 1.0) for s, _, stats in answers)
            came = plain_s / sum(seconds for seconds, _, _ in answers)
            ratios[kind] = came / promised
            shares[kind] = sum(stats["drafting_s"] for _, _, stats in answers) / sum(
                seconds for seconds, _, _ in answers
            )
            print(
                f"\n{kind}: promised {promised:.2f} x ({runtime.plan.verify_batch} tokens), came {came:.2f} x, "
                f"drafting {shares[kind]:.2%} of decoding",
                end="",
            )

    benchmark.pedantic(ask, rounds=1)
    close = sum(abs(1 - ratio) <= ENOUGH for ratio in ratios.values())
    print(
        f"\nwithin {ENOUGH:.0%} of the promise: {close} of {len(ratios)} kinds; drafting takes "
        f"{statistics.mean(shares.values()):.2%} of decoding"
    )
    benchmark.extra_info.update(ratios=ratios, shares=shares)

"""Speculative decoding compared with plain decoding, in turn, with the same answers: decoding times.

Run with `make bench`. LOWTIDE_PROMPTS names a file of prompts, one JSON object per line with `category` and
`turns` (the format of Spec-Bench); without it, only the prompts here are used. LOWTIDE_PER_KIND is the number
of prompts per kind, LOWTIDE_THREADS the number of threads. Drafts are reset before each answer.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from promising_drafts import largest_speculation
from prompts_file import prompts_by_kind
from requantised import requantised

from lowtide import Runtime
from lowtide.memory.plan.line import CACHE, COMPUTE, SAMPLING, SPECULATION
from lowtide.memory.units import GIB
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.loading.speculation import load_speculation
from lowtide.runtime.planning.plan import LoadConfig, ResolvedModel, plan_reference

pytestmark = pytest.mark.benchmark
ROUNDS = 3
MAX_TOKENS = 96
BELOW_FILE = "190MiB"
"""Less than the 271 MB of the file, but enough for the tests' own memory in this process."""
THREADS = int(os.environ.get("LOWTIDE_THREADS", "2"))
DENSE: dict[str, Any] = {
    "memory": "4GiB",
    "context": 2048,
    "threads": THREADS,
    "attention": "dense",
}
PARAGRAPH = (
    "The harbour lies behind a long wall of grey stone. At low tide the boats rest on the mud, and the "
    "children walk between them with buckets. At high tide the ferry comes in, and the bell on the quay is "
    "rung three times. Nobody remembers who hung the bell there."
)
CODE = (
    "def total(prices):\n    result = 0\n    for price in prices:\n        result = result + price\n"
    "    return result\n\n\ndef mean(prices):\n    return total(prices) / len(prices)\n"
)
COPIES = {
    "rewrite": f"Repeat this text word for word, and change grey to white:\n\n{PARAGRAPH}",
    "quote": f"Quote the whole text below, in quotation marks:\n\n{PARAGRAPH}",
    "list": "Continue this list up to item 20:\n"
    + "\n".join(f"Item {n}: box number {n} is on shelf {n}." for n in range(1, 8)),
    "edit code": f"Rename prices to costs in this code and print all of it:\n\n{CODE}",
}


def decoded_s(
    runtime: Runtime, prompt: str
) -> tuple[float, list[int | None], dict[str, Any] | None]:
    """Return the seconds of decoding an answer, its tokens, and the statistics of speculation."""
    messages = [{"role": "user", "content": prompt}]
    chunks = list(
        runtime.chat(messages, max_tokens=MAX_TOKENS, temperature=0, overflow="drop-oldest")
    )
    stats = chunks[-1].stats
    return stats.decode_s, [chunk.token_id for chunk in chunks], stats.speculation


def reset_drafts(runtime: Runtime) -> None:
    """Give the runtime empty drafts; the measured costs of passes are reused."""
    loaded = runtime._engine
    assert loaded.speculation is not None
    if loaded.planned.speculation is not None and loaded.planned.speculation.draft_model is None:
        loaded.speculation = load_speculation(
            loaded.planned, loaded.model, loaded.controller, loaded.ledger
        )


def ratio_of(plain: Runtime, drafting: Runtime, prompt: str, *, same: bool = True) -> float:
    """Run both in turn, and return the median ratio of the rounds; above 1 means speculation is faster."""
    ratios = []
    for _ in range(ROUNDS):
        plain_s, expected, _none = decoded_s(plain, prompt)
        reset_drafts(drafting)
        drafting_s, answer, speculation = decoded_s(drafting, prompt)
        assert speculation is not None
        if same:
            assert speculation["identical"] and answer == expected
        ratios.append(plain_s / max(drafting_s, 1e-9))
    return statistics.median(ratios)


def report(benchmark: Any, name: str, ratios: dict[str, float]) -> None:
    """Print and record the ratios."""
    mean = statistics.mean(ratios.values())
    benchmark.extra_info.update(ratios=ratios, mean=mean)
    for kind, ratio in ratios.items():
        print(f"\n{name}, {kind}: {ratio:.3f} x plain", end="")
    print(f"\n{name}, mean: {mean:.3f} x plain; least {min(ratios.values()):.3f}")


def planned_for(path: Path, memory: str, speculate: str = "off") -> ResolvedModel:
    """Plan for `memory`, without checking the budget later: this process has two models."""
    options = LoadConfig(
        memory=memory, context=1024, threads=THREADS, attention="dense", speculate=speculate
    )
    planned = plan_reference(path, options)
    budget = dataclasses.replace(planned.plan.budget, num_bytes=8 * GIB)
    plan = dataclasses.replace(planned.plan, budget=budget)
    return dataclasses.replace(planned, plan=plan)


@pytest.mark.parametrize("repack", [False, True], ids=["original", "repacked"])
def test_every_kind_of_prompt(benchmark: Any, smollm2: Path, *, repack: bool) -> None:
    kinds = prompts_by_kind(per_kind=2)
    ratios: dict[str, float] = {}

    def ask() -> None:
        with (
            Runtime.open(smollm2, **DENSE, repack=repack) as plain,
            Runtime.open(smollm2, **DENSE, repack=repack, speculate="auto") as drafting,
        ):
            for kind, prompts in kinds.items():
                found = [ratio_of(plain, drafting, prompt) for prompt in prompts]
                ratios[kind] = statistics.mean(found)

    benchmark.pedantic(ask, rounds=1)
    report(benchmark, f"auto, greedy{', repacked' * repack}", ratios)


@pytest.mark.parametrize("repack", [False, True], ids=["original", "repacked"])
def test_texts_that_copy_themselves(benchmark: Any, smollm2: Path, *, repack: bool) -> None:
    ratios: dict[str, float] = {}

    def ask() -> None:
        with (
            Runtime.open(smollm2, **DENSE, repack=repack) as plain,
            Runtime.open(smollm2, **DENSE, repack=repack, speculate="auto") as drafting,
        ):
            for kind, prompt in COPIES.items():
                ratios[kind] = ratio_of(plain, drafting, prompt)

    benchmark.pedantic(ask, rounds=1)
    report(benchmark, f"copies, auto{', repacked' * repack}", ratios)


def test_streamed_weights(benchmark: Any, smollm2: Path, tmp_path: Path) -> None:
    path = requantised(smollm2, tmp_path / "f16.gguf", "F16")
    ratios: dict[str, float] = {}

    def ask() -> None:
        plans = planned_for(path, BELOW_FILE), planned_for(path, BELOW_FILE, "auto")
        plain, drafting = (Runtime(Engine(planned)) for planned in plans)
        with plain, drafting:
            assert plain.plan.resident_layers is not None
            assert drafting.plan.resident_layers is not None and drafting.plan.verify_batch > 1
            for kind, prompt in COPIES.items():
                ratios[kind] = ratio_of(plain, drafting, prompt, same=False)

    benchmark.pedantic(ask, rounds=1)
    report(benchmark, f"F16 in {BELOW_FILE}, streamed weights", ratios)


@pytest.mark.parametrize("repack", [False, True], ids=["original", "repacked"])
def test_a_quantised_copy_as_draft_model(
    benchmark: Any, smollm2: Path, tmp_path: Path, *, repack: bool
) -> None:
    target = requantised(smollm2, tmp_path / "f16.gguf", "F16")
    draft = requantised(smollm2, tmp_path / "q4_0.gguf", "Q4_0")
    ratios: dict[str, float] = {}

    def ask() -> None:
        with (
            Runtime.open(target, **DENSE, repack=repack) as plain,
            Runtime.open(target, **DENSE, repack=repack, speculate=str(draft)) as drafting,
        ):
            for kind, prompt in COPIES.items():
                ratios[kind] = ratio_of(plain, drafting, prompt, same=False)

    benchmark.pedantic(ask, rounds=1)
    report(benchmark, f"F16 with its own Q4_0 copy as draft{', repacked' * repack}", ratios)


def generation_bytes(runtime: Runtime) -> int:
    """Return the planned bytes of generation: KV cache, compute buffer, logits, speculation."""
    components = (CACHE, COMPUTE, SAMPLING, SPECULATION)
    return sum(row.num_bytes for row in runtime.plan.rows if row.component in components)


def test_generation_memory_of_a_chat_of_twenty_turns(benchmark: Any, smollm2: Path) -> None:
    """With the needed context and what the allocator chooses, compared with the maximum and 32 tokens."""
    seconds: dict[str, float] = {}
    num_bytes: dict[str, int] = {}

    def talk(runtime: Runtime) -> float:
        messages: list[dict[str, str]] = []
        total = 0.0
        for turn in range(20):
            messages.append(
                {"role": "user", "content": f"Say line {turn} of the list: box {turn}."}
            )
            chunks = list(runtime.chat(messages, max_tokens=24, temperature=0))
            messages.append({"role": "assistant", "content": "".join(c.text for c in chunks)})
            total += chunks[-1].stats.decode_s
        return total

    def chat() -> None:
        common = {"memory": "8GiB", "threads": THREADS, "attention": "dense"}
        with (
            Runtime.open(smollm2, **common, context=2048, speculate="auto") as planned,  # type: ignore[arg-type]
            largest_speculation(),
            Runtime.open(smollm2, **common, context=8192, speculate="auto:draft=31") as free,  # type: ignore[arg-type]
        ):
            for name, runtime in (("planned", planned), ("unconstrained", free)) * 2:
                seconds[name] = talk(runtime)
                num_bytes[name] = generation_bytes(runtime)

    benchmark.pedantic(chat, rounds=1)
    saved = 1 - num_bytes["planned"] / num_bytes["unconstrained"]
    speed = seconds["unconstrained"] / seconds["planned"]
    benchmark.extra_info.update(saved=saved, throughput=speed)
    print(
        f"\na chat of 20 turns: {saved:.0%} less generation memory at {speed:.0%} of the throughput"
    )
    assert saved >= 0.65

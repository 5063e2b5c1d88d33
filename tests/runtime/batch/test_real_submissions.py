"""Submitted answers on llama.cpp: those of each prompt alone whoever joins and leaves, inside the budget."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_model
from processes import run_python

from lowtide import Runtime
from lowtide.runtime.errors import AnswerCancelled

GREEDY: dict[str, Any] = {"temperature": 0}
PREFIX = "At low tide the boats rest on the mud, and the children walk between them. " * 6


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("models") / "random.gguf", quantised="Q4_0", width=128
    )


@pytest.fixture(scope="module")
def together(random_model: Path) -> Iterator[Runtime]:
    options = {"memory": "4GiB", "context": 1024, "threads": 2, "attention": "dense"}
    with Runtime.open(random_model, sequences=5, **options) as runtime:  # type: ignore[arg-type]
        yield runtime


@pytest.fixture(scope="module")
def alone(random_model: Path) -> Iterator[Runtime]:
    options = {"memory": "4GiB", "context": 1024, "threads": 1, "attention": "dense"}
    with Runtime.open(random_model, **options) as runtime:  # type: ignore[arg-type]
        yield runtime


def test_answers_are_those_alone_while_others_join_leave_and_share(
    together: Runtime, alone: Runtime
) -> None:
    """Prompts that share a long beginning or nothing, submitted at random moments, some cancelled."""
    chance = random.Random(7)
    submitted: list[tuple[str, int, Any]] = []
    for i in range(24):
        prompt = PREFIX[: chance.choice((0, 300, len(PREFIX)))] + f"{i} " * chance.randint(1, 90)
        count = chance.randint(1, 40)
        submitted.append((prompt, count, together.submit(prompt, max_tokens=count, **GREEDY)))
        if chance.random() < 0.2:
            submitted[-1][2].cancel()
        time.sleep(chance.random() / 50)
    num_shared = 0
    for prompt, count, one in submitted:
        try:
            found = one.result(120)
        except AnswerCancelled:
            continue
        assert found.stats.batch["identical"], found.stats.batch
        assert found.token_ids == alone.generate(prompt, max_tokens=count, **GREEDY).token_ids
        num_shared += found.stats.reused_tokens > 256
    hook = together._engine.hook
    assert num_shared > 3 and hook is not None and hook.layouts_refused == 0


def test_answers_with_drafts_are_those_without(random_model: Path, alone: Runtime) -> None:
    options = {"memory": "4GiB", "context": 1024, "threads": 1, "attention": "dense"}
    prompts = [f"{word} and {word} and {word} and" for word in ("sea", "tide", "boat", "mud")]
    with Runtime.open(random_model, sequences=3, speculate="auto", **options) as runtime:  # type: ignore[arg-type]
        submitted = [runtime.submit(prompt, max_tokens=60, **GREEDY) for prompt in prompts]
        found = [one.result(120) for one in submitted]
    for prompt, result in zip(prompts, found, strict=True):
        expected = alone.generate(prompt, max_tokens=60, **GREEDY)
        stats = result.stats.speculation
        assert stats is not None
        if stats["identical"]:
            assert result.token_ids == expected.token_ids


def test_other_answers_and_embeddings_run_beside_submitted_ones(together: Runtime) -> None:
    submitted = [together.submit(f"tide {i}", max_tokens=30, **GREEDY) for i in range(8)]
    vectors = together.embed(["tide", "sea"])
    assert vectors.shape[0] == 2
    together.trim("complete")
    texts = [one.result(60).text for one in submitted]
    again = [together.submit(f"tide {i}", max_tokens=30, **GREEDY) for i in range(8)]
    assert [one.result(60).text for one in again] == texts


SWEEP = """
import random, sys
from lowtide import OverBudget, Runtime
from lowtide.runtime.errors import AnswerCancelled
try:
    runtime = Runtime.open({path!r}, memory={memory!r}, threads=2, sequences=4, max_waiting=100)
except OverBudget as error:
    print("refused", error)
    sys.exit()
with runtime:
    chance, context = random.Random(1), runtime.plan.batch.num_kv_tokens
    prefix = "At low tide the boats rest on the mud. " * 8
    submitted = []
    for i in range(20):
        size = chance.randrange(1, max(min(context // 3, 600), 2))
        prompt = prefix * (i % 2) + f"{{i}} one two " * (size // 6)
        submitted.append(runtime.submit(prompt, max_tokens=chance.randrange(1, 30), overflow="drop-oldest"))
        if i % 5 == 4:
            submitted[-2].cancel()
    for one in submitted:
        try:
            one.result(120)
        except AnswerCancelled:
            pass
    assert runtime.ledger.reserved_bytes <= runtime.ledger.budget_bytes
    print("ran", runtime.plan.budget.num_bytes)
"""


@pytest.mark.parametrize("memory", ["140MiB", "260MiB"])
def test_the_peak_stays_inside_every_budget_while_answers_come_and_go(
    smollm2: Path, memory: str
) -> None:
    measured = run_python(SWEEP.format(path=str(smollm2), memory=memory))
    assert measured.code == 0, measured.stderr
    if measured.stdout.startswith("refused"):
        assert memory == "140MiB"
        return
    assert measured.peak_bytes <= int(measured.stdout.split()[-1])

"""Batches that speculate on llama.cpp: the tokens of each prompt alone, in planned memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_drafting import CHEAP
from gguf_files import write_model
from processes import run_python

from lowtide import Runtime, SamplingParams
from lowtide.memory.plan.speculation import CostCurve
from lowtide.runtime.batch import speculation as batch_speculation_loading
from lowtide.runtime.speculation.step_cost import StepBenchmark, StepCostModel, benchmark_steps

PARAGRAPH = (
    "The harbour lies behind a long wall of grey stone. At low tide the boats rest on the mud. "
)
ENDS = (
    "Repeat that:\n" + PARAGRAPH[:30],
    "Count: one, two, three, four, one, two, three, four, one, two,",
    "Nobody",
    "The list: 1. a boat, 2. a boat, 3. a boat, 4. a boat,",
)
PROMPTS = [PARAGRAPH * 5 + end for end in ENDS]
OPTIONS: dict[str, Any] = {"memory": "4GiB", "context": 1024, "threads": 2, "attention": "dense"}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything verified, whatever this machine's passes cost."""

    def cheap(passes: Any, num_rows: int, key: str) -> StepBenchmark:
        found = benchmark_steps(passes, num_rows, key)
        rows = (1, num_rows)
        costs = CostCurve(num_rows=rows, seconds=tuple(map(CHEAP.of, rows)))
        return dataclasses.replace(found, costs=costs)

    monkeypatch.setattr(batch_speculation_loading, "benchmark_steps", cheap)
    monkeypatch.setattr(StepCostModel, "observe", lambda *_, **__: None)


@pytest.fixture(scope="module")
def drafting(smollm2: Path) -> Iterator[Runtime]:
    with Runtime.open(smollm2, **OPTIONS, speculate="auto") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("models") / "random.gguf", quantised="Q4_0", width=128
    )


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_answers_are_those_of_each_prompt_alone(
    smollm2: Path, drafting: Runtime, temperature: float
) -> None:
    hook = drafting._loaded.hook
    assert hook is not None
    refused = hook.layouts_refused
    options = [
        SamplingParams(max_tokens=n, temperature=temperature, seed=n) for n in (48, 40, 24, 56)
    ]
    with Runtime.open(smollm2, **OPTIONS) as plain:
        alone = [plain.generate(*one) for one in zip(PROMPTS, options, strict=True)]
    together = drafting.generate_batch(PROMPTS, options)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [r.text for r in together] == [r.text for r in alone]
    assert [r.finish_reason for r in together] == [r.finish_reason for r in alone]
    told = [r.stats.speculation for r in together]
    assert all(stats is not None and stats["identical"] for stats in told)
    assert sum(stats["accepted"] for stats in told if stats is not None) > 10
    batch = together[0].stats.batch
    assert batch is not None and batch["identical"]
    assert hook.layouts_refused == refused


def test_rows_are_verified_only_where_that_pays_here(drafting: Runtime) -> None:
    results = drafting.generate_batch(PROMPTS, max_tokens=24, temperature=0)
    for result in results:
        stats = result.stats.speculation
        assert stats is not None and stats["drafts"] == ["ngram", "trigram"]
        assert (stats["rounds"] == 0) == (stats["off_reason"] is not None)


@pytest.mark.usefixtures("eager")
def test_answers_from_other_cells_than_told_are_not_called_identical(
    drafting: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = drafting._loaded.hook
    assert hook is not None
    told = hook.set_batch_layout

    def wrong(cells):  # type: ignore[no-untyped-def]
        if cells is not None and len(cells.num_rows) > 1:
            cells.own[0][-1] = 0 if cells.own[0][-1] else 1
        told(cells)

    monkeypatch.setattr(hook, "set_batch_layout", wrong)
    for result in drafting.generate_batch(PROMPTS, max_tokens=3, temperature=0):
        batch, speculation = result.stats.batch, result.stats.speculation
        assert batch is not None and not batch["identical"]
        assert speculation is not None and not speculation["identical"]
        assert "other cells" in speculation["nondeterminism"]


def test_what_cannot_be_promised_is_said(random_model: Path) -> None:
    options = {**OPTIONS, "context": 512, "attention": "llama"}
    with Runtime.open(random_model, **options, speculate="ngram") as runtime:
        stats = runtime.generate_batch(["tide", "sea"], max_tokens=4)[0].stats.speculation
    assert stats is not None and not stats["identical"]
    assert "attention='dense'" in stats["nondeterminism"]


def test_a_draft_model_drafts_nothing_in_a_batch_and_it_is_said(random_model: Path) -> None:
    options = {**OPTIONS, "context": 512}
    with Runtime.open(random_model, **options, speculate=f"{random_model}:rows=4") as runtime:
        results = runtime.generate_batch(["tide", "sea"], max_tokens=8, temperature=0)
        alone = [runtime.generate(text, max_tokens=8, temperature=0) for text in ("tide", "sea")]
    assert [r.token_ids for r in results] == [r.token_ids for r in alone]
    stats = results[0].stats.speculation
    assert stats is not None and stats["rounds"] == 0
    assert "a draft model follows one text" in stats["off_reason"]


def test_the_peak_stays_inside_the_budget_also_where_costs_are_measured(smollm2: Path) -> None:
    """Rows of logits, tables of eight texts, and the comparison of each row with the one alone."""
    measured = run_python(
        f"""
from lowtide import Runtime
from lowtide.runtime.speculation.step_cost import StepCostModel
StepCostModel.of = lambda self, num_rows: 1.0 + 0.001 * num_rows
with Runtime.open({str(smollm2)!r}, memory="330MiB", context=512, threads=1, speculate="auto",
                  batch_size=64, attention="dense") as runtime:
    runtime.generate("one two three four " * 120, max_tokens=2)
    prompts = ["one two three four " * 60 + str(i) for i in range(8)]
    results = runtime.generate_batch(prompts, max_tokens=40, temperature=0)
    stats = results[0].stats
    assert stats.speculation["rounds"] > 0, stats.speculation
    assert stats.planned_bytes <= runtime.plan.budget.num_bytes
    print(max(rows for r in results for rows, _ in r.stats.speculation["rows"]))
    print(stats.planned_bytes)
"""
    )
    assert measured.code == 0, measured.stderr
    most_rows, planned_bytes = map(int, measured.stdout.split()[-2:])
    assert most_rows > 2
    assert measured.peak_bytes <= planned_bytes

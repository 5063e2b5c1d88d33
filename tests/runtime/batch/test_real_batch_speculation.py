"""Batches that speculate on llama.cpp: the tokens of each prompt alone, in planned memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promising_drafts
import pytest
from gguf_files import write_model
from processes import run_python
from promising_drafts import largest_speculation
from speculating import CHEAP_BATCH

from lowtide import Runtime, SamplingParams
from lowtide.memory.plan.speculation.allocator import CostCurve
from lowtide.runtime.loading import speculation as module
from lowtide.runtime.speculation.step_cost import StepBenchmark, StepCostModel, benchmark_steps

SUPPORT = Path(promising_drafts.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _speculation_as_large_as_allowed() -> Iterator[None]:
    with largest_speculation():
        yield


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
# The kernels are stated: two openings beside other work may find different ones to be faster, with other roundings.
OPTIONS: dict[str, Any] = {
    **{"memory": "4GiB", "context": 1024, "threads": 1, "attention": "dense"},
    "repack": True,
}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify everything, whatever passes cost on this machine."""

    def cheap(passes: Any, num_rows: int, key: str) -> StepBenchmark:
        found = benchmark_steps(passes, num_rows, key)
        rows = (1, num_rows)
        costs = CostCurve(num_rows=rows, seconds=tuple(map(CHEAP_BATCH.of, rows)))
        return dataclasses.replace(found, costs=costs)

    monkeypatch.setattr(module, "benchmark_steps", cheap)
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
    hook = drafting._engine.hook
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
    stats_of = [r.stats.speculation for r in together]
    assert all(stats is not None and stats["identical"] for stats in stats_of)
    assert sum(stats["accepted"] for stats in stats_of if stats is not None) > 10
    batch = together[0].stats.batch
    assert batch is not None and batch["identical"]
    assert hook.layouts_refused == refused


def test_drafts_are_verified_only_where_that_pays_on_this_machine(drafting: Runtime) -> None:
    results = drafting.generate_batch(PROMPTS, max_tokens=24, temperature=0)
    for result in results:
        stats = result.stats.speculation
        assert stats is not None and stats["drafts"] == ["ngram", "trigram"]
        assert (stats["rounds"] == 0) == (stats["off_reason"] is not None)


@pytest.mark.usefixtures("eager")
def test_answers_from_other_slots_than_expected_are_not_called_identical(
    drafting: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = drafting._engine.hook
    assert hook is not None
    set_layout = hook.set_batch_layout

    def wrong(cells):  # type: ignore[no-untyped-def]
        if cells is not None and len(cells.num_rows) > 1:
            cells.own[0][-1] = 0 if cells.own[0][-1] else 1
        set_layout(cells)

    monkeypatch.setattr(hook, "set_batch_layout", wrong)
    for result in drafting.generate_batch(PROMPTS, max_tokens=3, temperature=0):
        batch, speculation = result.stats.batch, result.stats.speculation
        assert batch is not None and not batch["identical"]
        assert speculation is not None and not speculation["identical"]
        assert "other slots" in speculation["nondeterminism"]


def test_nondeterminism_is_reported(random_model: Path) -> None:
    options = {**OPTIONS, "context": 512, "attention": "llama"}
    with Runtime.open(random_model, **options, speculate="ngram") as runtime:
        stats = runtime.generate_batch(["tide", "sea"], max_tokens=4)[0].stats.speculation
    assert stats is not None and not stats["identical"]
    assert "attention='dense'" in stats["nondeterminism"]


def test_a_draft_model_is_not_used_in_a_batch_and_the_reason_reported(random_model: Path) -> None:
    options = {**OPTIONS, "context": 512}
    with Runtime.open(random_model, **options, speculate=f"{random_model}:draft=3") as runtime:
        results = runtime.generate_batch(["tide", "sea"], max_tokens=8, temperature=0)
        alone = [runtime.generate(text, max_tokens=8, temperature=0) for text in ("tide", "sea")]
    assert [r.token_ids for r in results] == [r.token_ids for r in alone]
    stats = results[0].stats.speculation
    assert stats is not None and stats["rounds"] == 0
    assert "a draft model follows one sequence" in stats["off_reason"]


def test_the_peak_stays_inside_the_budget_also_where_costs_are_measured(smollm2: Path) -> None:
    """Logits, the tables of eight drafts, and the comparison of each token's logits with those alone."""
    measured = run_python(
        f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
from promising_drafts import largest_speculation
from lowtide import Runtime
from lowtide.runtime.speculation.step_cost import StepCostModel
StepCostModel.of = lambda self, num_rows: 1.0 + 0.001 * num_rows
with largest_speculation(), Runtime.open({str(smollm2)!r}, memory="330MiB", context=512, threads=1, speculate="auto",
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

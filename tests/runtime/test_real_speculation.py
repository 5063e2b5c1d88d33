"""Speculation on llama.cpp: tokens and logits of the plain loop, in planned memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_model
from processes import run_python
from speculating import CHEAP

from lowtide import OverBudget, Runtime, Tidal
from lowtide.memory.plan.line import DRAFT_WEIGHTS, SPECULATION
from lowtide.models.errors import BadOption
from lowtide.models.gguf.dry_run import SimulatedGguf
from lowtide.models.gguf.spec import read_spec
from lowtide.runtime.speculation.step_cost import StepCostModel

PROMPTS = (
    "Write this sentence three times: The harbour master counts the boats that come in with the tide.",
    "Continue the list up to 12: 1. one, 2. two, 3. three, 4. four,",
    "Why is the sea salty?",
)
OPTIONS = {"memory": "4GiB", "context": 1024, "threads": 2, "attention": "dense"}


def eager(runtime: Runtime) -> Runtime:
    """Have everything verified, whatever this machine's passes cost."""
    speculator = runtime._loaded.speculator
    assert speculator is not None
    speculator._control.costs = StepCostModel(CHEAP)
    return runtime


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Iterator[Runtime]:
    with Runtime.open(smollm2, **OPTIONS) as runtime:  # type: ignore[arg-type]
        yield runtime


@pytest.fixture(scope="module")
def drafting(smollm2: Path) -> Iterator[Runtime]:
    with Runtime.open(smollm2, **OPTIONS, speculate="auto") as runtime:  # type: ignore[arg-type]
        yield eager(runtime)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_answers_are_the_plain_loops_and_so_is_the_cache_after_them(
    plain: Runtime, drafting: Runtime, prompt: str, temperature: float
) -> None:
    told = []
    for runtime in (plain, drafting):
        messages = [{"role": "user", "content": prompt}]
        pieces = list(runtime.chat(messages, max_tokens=40, temperature=temperature, seed=7))
        runtime._session.sync()
        logits = runtime._session.decode((11,)).copy()
        told.append(([p.token_id for p in pieces], [p.text for p in pieces], logits))
        stats = pieces[-1].stats
    assert told[0][:2] == told[1][:2]
    assert np.array_equal(told[0][2], told[1][2])
    assert stats.speculation is not None and stats.speculation["identical"]


def test_some_of_it_was_drafted(drafting: Runtime) -> None:
    messages = [{"role": "user", "content": PROMPTS[0]}]
    *_, last = drafting.chat(messages, max_tokens=60, temperature=0)
    stats = last.stats.speculation
    assert stats is not None and stats["accepted"] > 5
    assert stats["verifying_s"] > 0 and set(stats["rounds_by_draft"]) <= {"ngram", "trigram"}


def test_what_cannot_be_promised_is_said(smollm2: Path) -> None:
    options = {**OPTIONS, "attention": "llama"}
    with Runtime.open(smollm2, **options, speculate="ngram") as runtime:  # type: ignore[arg-type]
        stats = runtime.generate("One two", max_tokens=3).stats.speculation
    assert stats is not None and not stats["identical"]
    assert "attention='dense'" in stats["nondeterminism"]


def test_more_rows_of_logits_take_no_more_than_their_row_of_the_plan(smollm2: Path) -> None:
    """llama.cpp's graph with its logits of eight rows, laid out; the output's rows are as many again."""
    spec = read_spec(smollm2)
    simulated = SimulatedGguf(spec)
    try:
        one, eight = (
            simulated._measured(
                dataclasses.replace(next(iter(simulated._contexts)), verify_batch=rows)
            ).compute_bytes
            for rows in (1, 8)
            if simulated.context(1024, 32, "f16")
        )
    finally:
        simulated.close()
    assert eight - one <= 7 * 4 * spec.vocabulary.num_tokens


def test_the_peak_stays_inside_the_plan(smollm2: Path) -> None:
    measured = run_python(
        f"""
from lowtide import Runtime
from lowtide.memory.plan.speculation import CostCurve
from lowtide.runtime.speculation.step_cost import StepCostModel
with Runtime.open({str(smollm2)!r}, memory="400MiB", context=512, threads=1, speculate="auto") as runtime:
    runtime._loaded.speculator._control.costs = StepCostModel(CostCurve(num_rows=(1, 8), seconds=(1.0, 1.1)))
    result = runtime.generate("one two three four " * 60, max_tokens=60, temperature=0)
    assert result.stats.speculation["rounds"] > 0, result.stats.speculation
    print(runtime.plan.total_bytes)
"""
    )
    assert measured.code == 0, measured.stderr
    planned = int(measured.stdout.split()[-1])
    assert measured.peak_bytes <= planned


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("models") / "random.gguf", quantised="Q4_0", width=128
    )


def test_a_draft_model_drafts_and_its_bytes_are_planned(random_model: Path) -> None:
    options = {"memory": "4GiB", "context": 512, "threads": 1}
    with Runtime.open(random_model, **options) as runtime:  # type: ignore[arg-type]
        expected = runtime.generate("tide", max_tokens=30, temperature=0)
    with Runtime.open(random_model, **options, speculate=f"{random_model}:rows=4") as runtime:  # type: ignore[arg-type]
        components = {row.component: row.num_bytes for row in runtime.plan.rows}
        assert components[DRAFT_WEIGHTS] > 0 and components[SPECULATION] > 0
        result = eager(runtime).generate("tide", max_tokens=30, temperature=0)
        again = runtime.generate("tide goes", max_tokens=8, temperature=0)
    assert result.token_ids == expected.token_ids and len(again.token_ids) == 8
    stats = result.stats.speculation
    assert stats is not None and stats["drafts"] == ["model"]
    assert stats["accepted"] >= stats["drafted"] - 3 > 10  # the last round is cut by max_tokens


def test_a_draft_of_another_vocabulary_and_one_that_is_too_large_are_refused(
    random_model: Path, smollm2: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadOption, match=r"vocabulary of 49,152 tokens .* one of 320"):
        Runtime.open(random_model, memory="4GiB", speculate=str(smollm2))
    with pytest.raises(OverBudget, match="raise --memory to"):
        Runtime.open(smollm2, memory="150MiB", context=512, speculate=str(smollm2))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("ngram:rows=0", "2 to 32 rows"),
        ("auto:rows=many", "2 to 32 rows"),
        ("", "speculate is empty"),
        ("/nowhere/draft.gguf", "/nowhere/draft.gguf"),
    ],
)
def test_wrong_wishes_are_a_sentence_before_anything_is_loaded(
    stated: str, message: str, random_model: Path
) -> None:
    from lowtide import LowtideError

    with pytest.raises(LowtideError, match=message):
        Runtime.open(random_model, memory="4GiB", speculate=stated)


def test_tokens_that_are_computed_again_are_not_drafted_and_it_is_said(random_model: Path) -> None:
    with Runtime.open(
        random_model,
        memory="4GiB",
        speculate="ngram",
        attention=Tidal(k=100, selection_layers=(1,), correction=4),
    ) as runtime:
        stats = runtime.generate("tide tide tide", max_tokens=8, temperature=0).stats.speculation
    assert stats is not None and stats["rounds"] == 0
    assert stats["off_reason"] == "tidal's correction computes decoded tokens again"

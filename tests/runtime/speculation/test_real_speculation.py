"""Speculation on llama.cpp: the tokens and logits of the plain loop, in planned memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import promising_drafts
import pytest
from gguf_files import write_model
from processes import run_python
from promising_drafts import largest_speculation
from speculating import CHEAP

from lowtide import OverBudget, Runtime, Tidal
from lowtide.memory.plan.line import DRAFT_WEIGHTS, SPECULATION
from lowtide.models.errors import BadOption
from lowtide.models.gguf.dry_run import SimulatedGguf
from lowtide.models.gguf.header.spec import read_spec
from lowtide.runtime.speculation.step_cost import StepCostModel

SUPPORT = Path(promising_drafts.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _speculation_as_large_as_allowed() -> Iterator[None]:
    with largest_speculation():
        yield


PROMPTS = (
    "Write this sentence three times: The harbour master counts the boats that come in with the tide.",
    "Continue the list up to 12: 1. one, 2. two, 3. three, 4. four,",
    "Why is the sea salty?",
)
OPTIONS = {"memory": "4GiB", "context": 1024, "threads": 1, "attention": "dense"}


def eager(runtime: Runtime) -> Runtime:
    """Verify everything, whatever passes cost on this machine."""
    speculation = runtime._engine.speculation
    assert speculation is not None
    speculation.costs = StepCostModel(CHEAP)
    return runtime


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Iterator[Runtime]:
    with Runtime.open(smollm2, **OPTIONS) as runtime:  # type: ignore[arg-type]
        yield runtime


@pytest.fixture(scope="module")
def drafting(smollm2: Path) -> Iterator[Runtime]:
    with (
        patch("lowtide.runtime.speculation.controller.FREE_LOSS_STEPS", 1e9),
        patch("lowtide.runtime.speculation.sequence_drafts.FREE_WASTE_S", 1e9),
        Runtime.open(smollm2, **OPTIONS, speculate="auto") as runtime,  # type: ignore[arg-type]
    ):
        yield eager(runtime)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_answers_and_cache_are_those_of_the_plain_loop(
    plain: Runtime, drafting: Runtime, prompt: str, temperature: float
) -> None:
    seen = []
    for runtime in (plain, drafting):
        messages = [{"role": "user", "content": prompt}]
        chunks = list(runtime.chat(messages, max_tokens=40, temperature=temperature, seed=7))
        runtime._session.sync()
        logits = runtime._session.decode_token(11).copy()
        seen.append(([p.token_id for p in chunks], [p.text for p in chunks], logits))
        stats = chunks[-1].stats
    assert seen[0][:2] == seen[1][:2]
    assert np.array_equal(seen[0][2], seen[1][2])
    assert stats.speculation is not None and stats.speculation["identical"]


def test_some_tokens_are_drafted(drafting: Runtime) -> None:
    messages = [{"role": "user", "content": PROMPTS[0]}]
    *_, last = drafting.chat(messages, max_tokens=60, temperature=0)
    stats = last.stats.speculation
    assert stats is not None and stats["accepted"] > 5
    assert stats["verifying_s"] > 0 and set(stats["rounds_by_draft"]) <= {"ngram", "trigram"}


def test_nondeterminism_is_reported(smollm2: Path) -> None:
    options = {**OPTIONS, "attention": "llama", "threads": 2}
    with Runtime.open(smollm2, **options, speculate="ngram") as runtime:  # type: ignore[arg-type]
        stats = runtime.generate("One two", max_tokens=3).stats.speculation
    assert stats is not None and not stats["identical"]
    assert "attention='dense'" in stats["nondeterminism"]


def test_more_logits_take_no_more_than_planned(smollm2: Path) -> None:
    """A dry run of llama.cpp's graph with the logits of eight tokens; the output buffer has as many again."""
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
import sys
sys.path.insert(0, {str(SUPPORT)!r})
from promising_drafts import largest_speculation
from lowtide import Runtime
from lowtide.memory.plan.speculation.allocator import CostCurve
from lowtide.runtime.speculation.step_cost import StepCostModel
options = dict(memory="400MiB", context=512, threads=1, speculate="auto")
with largest_speculation(), Runtime.open({str(smollm2)!r}, **options) as runtime:
    runtime._engine.speculation.costs = StepCostModel(CostCurve(num_rows=(1, 8), seconds=(1.0, 1.1)))
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
    with Runtime.open(random_model, **options, speculate=f"{random_model}:draft=3") as runtime:  # type: ignore[arg-type]
        components = {row.component: row.num_bytes for row in runtime.plan.rows}
        assert components[DRAFT_WEIGHTS] > 0 and components[SPECULATION] > 0
        result = eager(runtime).generate("tide", max_tokens=30, temperature=0)
        again = runtime.generate("tide goes", max_tokens=8, temperature=0)
    assert result.token_ids == expected.token_ids and len(again.token_ids) == 8
    stats = result.stats.speculation
    assert stats is not None and stats["drafts"] == ["model"]
    assert stats["accepted"] >= stats["drafted"] - 3 > 10  # max_tokens ends the last round


def test_a_draft_of_another_vocabulary_and_one_that_is_too_large_are_refused(
    random_model: Path, smollm2: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadOption, match=r"vocabulary of 49,152 tokens .* one of 320"):
        Runtime.open(random_model, memory="4GiB", speculate=str(smollm2))
    with pytest.raises(OverBudget, match="raise memory to"):
        Runtime.open(smollm2, memory="150MiB", context=512, speculate=str(smollm2))


@pytest.mark.parametrize(
    ("speculate", "message"),
    [
        ("ngram:draft=-1", "draft must be between 1 and 31"),
        ("auto:draft=many", "draft must be between 1 and 31"),
        ("", "speculate is empty"),
        ("/nowhere/draft.gguf", "/nowhere/draft.gguf"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_loaded(
    speculate: str, message: str, random_model: Path
) -> None:
    from lowtide import LowtideError

    with pytest.raises(LowtideError, match=message):
        Runtime.open(random_model, memory="4GiB", speculate=speculate)


def test_with_a_correction_nothing_is_drafted_and_the_reason_reported(random_model: Path) -> None:
    with Runtime.open(
        random_model,
        memory="4GiB",
        speculate="ngram",
        attention=Tidal(k=100, selection_layers=(1,), correction=4),
    ) as runtime:
        stats = runtime.generate("tide tide tide", max_tokens=8, temperature=0).stats.speculation
    assert stats is not None and stats["rounds"] == 0
    assert stats["off_reason"] == "the correction of tidal computes decoded tokens again"

"""Random requests, each in a process of its own: inside the budget, and refused only below the lower bound.

`LOWTIDE_SWEEP=200` runs 200 cases; `LOWTIDE_SWEEP_SEED` draws others.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass

import pytest
from processes import run_lowtide, run_python

from lowtide.memory.units import MIB

pytestmark = pytest.mark.real

NUM_CASES = int(os.environ.get("LOWTIDE_SWEEP", "12"))
TOLERANCE_BYTES = 4 * MIB
"""The bound is measured, and varies by so much with what the process did before."""
QUICK = (1, 5, 11)
"""The numbers of the cases that `make test` runs; `make test-all` runs all of them."""
SEED = int(os.environ.get("LOWTIDE_SWEEP_SEED", "5"))


@dataclass(frozen=True)
class Case:
    """A request; `context` None leaves it to the plan, `prompt_words` are per turn.

    `attention` is a policy, or the switch that runs llama.cpp's kernels alone.
    """

    budget_bytes: int
    context: int | None
    prompt_words: int
    turns: int
    attention: str

    @classmethod
    def drawn(cls, numbers: random.Random) -> Case:
        """Draw a budget from below any bound to where everything fits; a third of them are near the bounds."""
        near = numbers.random() < 1 / 3
        return cls(
            budget_bytes=numbers.randrange(60 * MIB, (120 if near else 400) * MIB),
            context=numbers.choice([None, None, 512, 777, 1024, 2048, 4096, 8192]),
            prompt_words=numbers.choice([1, 20, 100, 250]),
            turns=numbers.randint(1, 3),
            attention=numbers.choice(["auto", "auto", "reference", "tidal"]),
        )

    def options(self) -> list[str]:
        """The request on the command line."""
        context = [] if self.context is None else ["-c", str(self.context)]
        is_reference = self.attention == "reference"
        kernels = ["--reference"] if is_reference else ["--attention", self.attention]
        return ["--memory", str(self.budget_bytes), *kernels, *context]

    @property
    def kernels(self) -> dict[str, object]:
        """The same in Python."""
        is_reference = self.attention == "reference"
        return {"reference": True} if is_reference else {"attention": self.attention}


CASES = [Case.drawn(numbers) for numbers in [random.Random(SEED)] for _ in range(NUM_CASES)]

_RUN = """
import json
from lowtide import GenerationResult, OverBudget, PromptTooLong, Runtime
from lowtide.memory.process import read_process_memory
from lowtide.runtime.planning.plan import LoadConfig, plan_reference
opening = dict(memory={case.budget_bytes}, context={case.context}, threads=1, **{case.kernels})
plan = plan_reference("smollm2", LoadConfig(**opening)).plan
report = dict(
    bound=plan.lower_bound_bytes, needs=plan.total_bytes, planning=read_process_memory().peak_bytes
)
try:
    runtime = Runtime.open("smollm2", **opening)
except OverBudget as error:
    report.update(refused=error.needed_bytes)
else:
    with runtime:
        history, ended = [], []
        for turn in range({case.turns}):
            history.append(dict(role="user", content="tide %d " % turn * {case.prompt_words}))
            try:
                result = GenerationResult.of(
                    runtime.chat(history, max_tokens=6, temperature=0, overflow="drop-oldest")
                )
            except PromptTooLong:
                history.pop()
                continue
            history.append(dict(role="assistant", content=result.text))
            ended.append(result.finish_reason)
            report.update(peak=result.stats.peak_rss_bytes, trims=len(result.stats.trims))
        report.update(ended=ended, planned=runtime.plan.total_bytes)
print(json.dumps(report))
"""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(number), marks=[] if number in QUICK else [pytest.mark.slow])
        for number, case in enumerate(CASES)
    ],
)
def test_inside_the_budget_and_refused_only_below_the_bound(case: Case) -> None:
    done = run_python(_RUN.format(case=case), timeout=600)
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert done.peak_bytes <= max(
        case.budget_bytes, 64 * MIB
    )  # at least what Python and its libraries need
    assert report["planning"] <= max(report["needs"], 64 * MIB)
    if "refused" in report:
        assert case.budget_bytes < report["bound"] + TOLERANCE_BYTES
        return
    assert case.budget_bytes > report["bound"] - TOLERANCE_BYTES
    if not report["ended"]:
        return  # every prompt was longer than the context
    assert report["peak"] <= report["planned"] <= case.budget_bytes


@pytest.mark.slow
@pytest.mark.skipif(NUM_CASES < 12, reason="too few cases for every kind")
def test_every_kind_of_case_occurs() -> None:
    assert {None, 512, 8192} <= {case.context for case in CASES}
    assert {case.turns for case in CASES} == {1, 2, 3}
    assert {case.attention for case in CASES} == {"auto", "reference", "tidal"}
    plans = [run_lowtide("plan", *case.options(), "--json") for case in CASES[:24]]
    assert (
        0 < sum(plan.code == 2 for plan in plans) < len(plans) / 2
    )  # some are refused, most are run

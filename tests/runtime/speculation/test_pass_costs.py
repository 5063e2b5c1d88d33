"""Costs of passes are measured once, stored, and measured again where the file is invalid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lowtide import FakeModel, Runtime
from lowtide.memory.plan.speculation.allocator import CostCurve
from lowtide.runtime.speculation.step_cost import StepCostModel, benchmark_steps, stored_costs


def test_costs_are_measured_once_for_each_key(tmp_path: Path) -> None:
    model = FakeModel()
    first = benchmark_steps(model, 8, "this machine")
    assert first.costs.num_rows == (1, 2, 4, 8) and min(first.costs.seconds) > 0
    assert first.rows_agree and model.num_tokens == 0
    num_passes = len(model.rows)
    assert benchmark_steps(model, 8, "this machine") == first
    assert len(model.rows) == num_passes
    benchmark_steps(model, 8, "another machine")
    assert len(model.rows) > num_passes


def test_a_shorter_pass_is_not_measured_again_and_a_longer_one_is() -> None:
    model = FakeModel()
    whole = benchmark_steps(model, 8, "key").costs
    num_passes = len(model.rows)
    shorter = benchmark_steps(model, 5, "key").costs
    assert shorter.num_rows == (1, 2, 4, 5) and shorter.of(5) == whole.of(5)
    assert len(model.rows) - num_passes <= 6  # only whether its rows agree
    assert stored_costs("key") == whole and stored_costs("another key") is None
    assert benchmark_steps(model, 16, "key").costs.num_rows[-1] == 16


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "[]",
        "{}",
        '{"num_rows": [1, 8], "seconds": [-1, 2], "rows_agree": {"8": true}}',
        '{"num_rows": [8, 1], "seconds": [1, 2], "rows_agree": {"8": true}}',
        '{"num_rows": [1, 8], "seconds": [1, NaN], "rows_agree": {"8": true}}',
        '{"num_rows": [1, 8], "seconds": [1, 2], "rows_agree": true}',
    ],
)
def test_an_invalid_file_is_measured_again(tmp_path: Path, broken: str) -> None:
    model = FakeModel()
    benchmark_steps(model, 8, "key")
    (path,) = (tmp_path / "calibrations").glob("pass-costs-*.json")
    whole = json.loads(path.read_text())
    path.write_text(broken)
    num_passes = len(model.rows)
    assert benchmark_steps(model, 8, "key").costs.num_rows == tuple(whole["num_rows"])
    assert len(model.rows) > num_passes


def test_a_folder_that_is_not_writable_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "calibrations").write_text("a file")
    assert benchmark_steps(FakeModel(), 4, "key").costs.num_rows == (1, 2, 4)


class Rounding(FakeModel):
    def forward_rows(self, token_ids: Sequence[int]) -> np.ndarray:
        rows = super().forward_rows(token_ids)
        return np.nextafter(rows, np.float32(np.inf)) if len(token_ids) > 3 else rows


class RoundingPairs(FakeModel):
    def forward_rows(self, token_ids: Sequence[int]) -> np.ndarray:
        rows = super().forward_rows(token_ids)
        return np.nextafter(rows, np.float32(np.inf)) if len(token_ids) > 1 else rows


def test_logits_that_depend_on_the_batch_are_detected() -> None:
    assert not benchmark_steps(Rounding(), 8, "key").rows_agree
    assert benchmark_steps(Rounding(), 3, "key").rows_agree


def test_answers_of_such_a_model_object_are_not_called_identical() -> None:
    with Runtime.open(RoundingPairs(), memory="8GiB", speculate="ngram") as runtime:
        stats = runtime.generate("abc\n", temperature=0).stats.speculation
    assert stats is not None and not stats["identical"]
    assert "round a token's result" in stats["nondeterminism"]


def test_passes_without_drafts_set_the_time_of_all_passes() -> None:
    curve = CostCurve(num_rows=(1, 8, 16), seconds=(1.0, 4.0, 8.0))
    costs = StepCostModel(curve)
    for _ in range(60):
        costs.observe(8, 2.0, plain_rows=8)
    assert costs.of(8) == pytest.approx(2.0, rel=0.01)
    assert costs.of(16) == pytest.approx(4.0, rel=0.01)
    for _ in range(60):
        costs.observe(16, 6.0, plain_rows=8)
    assert costs.of(16) == pytest.approx(6.0, rel=0.01) and costs.of(8) < 3.0

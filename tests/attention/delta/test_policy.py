"""Delta as a value: what is typed, what is fitted to a model, and calibrations."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide.attention.calibration import CalibrationError
from lowtide.attention.delta.tokens import (
    Delta,
    DeltaCalibration,
    HeadGroups,
    allocate,
    cheapest,
    fit_score_bias,
    save_delta_calibration,
    scale_bytes,
)
from lowtide.attention.parse import parse_policy
from lowtide.models.errors import BadOption
from lowtide.models.gguf.spec import read_spec
from lowtide.models.spec import ModelSpec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("delta", Delta()),
        ("delta:sparsity=0.5", Delta(sparsity=0.5)),
        ("delta:sparsity=30%,window=256", Delta(sparsity=0.3, window=256)),
        ("delta:sinks=0,prompts=exact", Delta(sinks=0, prompts="exact")),
        ("delta:refine=0", Delta(refine=0)),
        ("delta:refine=0.5%", Delta(refine=0.005)),
        ("delta:calibration=/x.json", Delta(calibration=Path("/x.json"))),
    ],
)
def test_policies_by_name(text: str, expected: Delta) -> None:
    assert parse_policy(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("delta:k=5", "delta has no setting 'k', it has sparsity, window"),
        ("delta:window=-1", "delta's window is -1, 1 to 65,536 is wanted"),
        ("delta:window=0", "window is 0"),
        ("delta:window=wide", "delta's window is 'wide', a whole number is wanted"),
        ("delta:sinks=8", "delta's sinks is 8, 0 to 7 is wanted"),
        ("delta:sparsity=0.9", "delta's sparsity is 0.9, 0 to 0.875 is wanted"),
        ("delta:sparsity=-0.1", "sparsity is -0.1"),
        ("delta:sparsity=nan", "sparsity is nan"),
        ("delta:sparsity=half", "delta's sparsity is 'half', a share or a percentage is wanted"),
        ("delta:refine=2", r"delta's refine is 2, 0 \(none\) to 1 is wanted"),
        ("delta:refine=nan", "refine is nan"),
        ("delta:refine=many", "delta's refine is 'many', a share or a percentage is wanted"),
        ("delta:prompts=bf16", "delta's prompts is 'bf16', one of grouped, exact is wanted"),
        ("delta:sparsity=0.5,calibration=x", "sparsity and calibration are given"),
        ("gem:then=delta", "gem's then is 'delta', dense or tidal is wanted"),
    ],
)
def test_wrong_policies_name_the_field(text: str, message: str, smollm2: Path) -> None:
    with pytest.raises(BadOption, match=message):
        parse_policy(text).resolve(read_spec(smollm2))


@pytest.fixture
def spec(smollm2: Path) -> ModelSpec:
    return read_spec(smollm2)


@pytest.fixture
def calibration(spec: ModelSpec) -> DeltaCalibration:
    return DeltaCalibration(
        fingerprint=spec.fingerprint,
        model=spec.name,
        units=replace(HeadGroups.uniform(30, 3, 64, 24), score_bias=((0.0, 0.25, 12.5),) * 30),
        kl=0.01,
        target_kl=0.012,
        key_loss=0.02,
        target_key_loss=0.1,
        context=2048,
        keys_read=0.4,
        text="a text",
    )


def test_a_stated_sparsity_groups_every_unit_alike(spec: ModelSpec) -> None:
    fitted = Delta(sparsity=0.5).resolve(spec)
    assert fitted.units == HeadGroups.uniform(30, 3, 64, 32)
    assert str(fitted) == "delta, sparsity 50%, window 128 (stated)"
    groups = fitted.key_groups
    assert groups is not None and groups.num_groups == (32,) * 90


def test_a_calibration_is_kept_and_read_again(
    calibration: DeltaCalibration, spec: ModelSpec, tmp_path: Path
) -> None:
    path = save_delta_calibration(calibration, tmp_path / "c.json")
    fitted = Delta(calibration=path).resolve(spec)
    assert fitted.units == calibration.units
    assert "calibrated: KL 0.010 at 2,048 tokens" in str(fitted)
    other = Delta(units=calibration.units).resolve(spec)
    assert fitted.cache_key == other.cache_key != replace(other, window=64).cache_key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "tidal"}, "is of 'tidal', one of 'delta' is wanted"),
        ({"format": 7}, "format is 7, 2 is wanted"),
        ({"fingerprint": "0" * 32}, "of another model|fingerprint"),
        ({"num_groups": ["8 8 8"] * 29}, "num_groups is .*8 to 64 for each KV head of 30 layers"),
        ({"num_groups": ["8 8 7"] * 30}, "num_groups is"),
        ({"num_groups": ["8 8"] * 30}, "num_groups is"),
        ({"num_groups": ["8 8 x"] * 30}, "num_groups is"),
        ({"num_groups": "8"}, "num_groups is '8'"),
        ({"score_bias": ["0 0 -1"] * 30}, "lifts is .*numbers of 0 to 1e9"),
        ({"score_bias": ["0 0"] * 30}, "lifts is"),
        ({"scales": ["zz zz zz"] * 30}, "scales is .*64 bytes in hex"),
        ({"scales": ["ff ff ff"] * 30}, "scales is"),
        ({"kl": -1}, "kl is -1"),
    ],
)
def test_broken_calibrations_name_the_field(
    change: dict[str, Any],
    message: str,
    calibration: DeltaCalibration,
    spec: ModelSpec,
    tmp_path: Path,
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**calibration.to_dict(), **change}))
    with pytest.raises(CalibrationError, match=message):
        Delta(calibration=path).resolve(spec)


def test_models_that_cannot_be_grouped_are_refused(spec: ModelSpec) -> None:
    with pytest.raises(BadOption, match=r"as many KV heads in every layer, .* has 2, 3"):
        Delta(sparsity=0.5).resolve(replace(spec, num_kv_heads=(2, *spec.num_kv_heads[1:])))
    windowed = replace(spec, sliding_window=512, fingerprint="none")
    with pytest.raises(BadOption, match="which of them is not known: run lowtide calibrate"):
        Delta(sparsity=0.5).resolve(windowed)


def test_a_model_without_a_calibration_is_told(spec: ModelSpec) -> None:
    fitted = Delta().resolve(replace(spec, fingerprint="none"))
    assert str(fitted) == "delta, sparsity 25%, window 128 (not calibrated for this model)"


def errors_of(worth: Callable[[float], float]) -> np.ndarray:
    """Errors of four units with 8, 16 and 32 groups; the first loses a hundred times what the last does."""
    units = np.array([1, 0.1, 0.03, 0.01])
    return np.stack([units * worth(n) for n in (8, 16, 32)]).reshape(3, 2, 2).astype(np.float32)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.9])
def test_groups_go_where_they_are_worth_most(share: float) -> None:
    errors = errors_of(lambda n: (1 - n / 64) ** 2)
    found = np.array(allocate(errors, (8, 16, 32), share)).ravel()
    assert found.mean() <= share * 64
    assert list(found) == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_a_unit_that_cannot_be_grouped_keeps_everything_and_does_not_count() -> None:
    errors = errors_of(lambda n: 1 - n / 64)
    errors[:, 0, 0] = np.inf
    found = np.array(allocate(errors, (8, 16, 32), 0.25)).ravel()
    assert found[0] == 64
    assert 8 <= found[1:].mean() <= 16


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most", [0.3, 0.5, 0.8])
def test_what_few_units_take_is_the_best_there_is(seed: int, most: float) -> None:
    rng = np.random.default_rng(seed)
    shares = np.sort(rng.random((4, 3)), axis=0) * 0.3 + 0.1
    errors = -np.sort(-rng.random((4, 3)), axis=0)
    found = cheapest(errors[:, None].astype(np.float32), shares[:, None], most)
    assert found is not None
    kept, costs = np.vstack([shares, np.ones(3)]), np.vstack([errors, np.zeros(3)])
    units = range(3)
    of_each = {
        picked: (kept[picked, units].mean(), costs[picked, units].sum())
        for picked in itertools.product(range(5), repeat=3)
    }
    own = of_each[tuple(map(int, found[0]))]
    assert own[0] <= most
    step = 1 / 512  # what is kept is rounded up to that
    assert own[1] <= min(cost for share, cost in of_each.values() if share <= most - step) + 1e-6


def test_what_no_unit_can_keep_is_not_found() -> None:
    errors, shares = np.ones((1, 1, 2), np.float32), np.full((1, 1, 2), 0.4)
    assert cheapest(errors, shares, 0.39) is None
    assert cheapest(np.full_like(errors, np.inf), shares, 0.9) is None


def test_each_unit_takes_the_lift_that_is_best_for_it() -> None:
    best = np.array([[0.0, 0.3], [1.0, 0.12]])
    squares = np.array([[2.0, 8.0], [1.0, 6.0]], np.float32)
    wanted = best * squares / 2
    found = fit_score_bias(
        squares, lambda score_bias: np.abs(np.array(score_bias) - wanted).astype(np.float32)
    )
    assert np.allclose(found, wanted, rtol=1e-3)


def test_scales_are_those_of_the_queries() -> None:
    squares = np.array([[[4.0, 1.0, 0.0, 0.25]]], np.float32)
    assert scale_bytes(squares) == ((bytes([255, 128, 1, 64]),),)

"""Delta by blocks as a value: what is typed, what is fitted to a model, and calibrations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide.attention.calibration import CalibrationError
from lowtide.attention.delta.blocks import (
    DeltaBlocks,
    DeltaBlocksCalibration,
    HeadThresholds,
    save_blocks_calibration,
)
from lowtide.attention.delta.tokens import Delta
from lowtide.attention.parse import parse_policy
from lowtide.models.errors import BadOption
from lowtide.models.gguf.spec import read_spec
from lowtide.models.spec import ModelSpec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("delta:granularity=row,sparsity=0.5", Delta(sparsity=0.5)),
        ("delta:granularity=block", DeltaBlocks()),
        ("delta:granularity=block,refine=2%", DeltaBlocks(refine=0.02)),
        ("delta:granularity=block,block=16,sparsity=30%", DeltaBlocks(block=16, sparsity=0.3)),
        (
            "delta:granularity=element,threshold=0.5,window=64",
            DeltaBlocks(granularity="element", threshold=0.5, window=64),
        ),
        (
            "delta:granularity=block,prompts=exact,calibration=/x.json",
            DeltaBlocks(prompts="exact", calibration=Path("/x.json")),
        ),
    ],
)
def test_policies_by_name(text: str, expected: Delta | DeltaBlocks) -> None:
    assert parse_policy(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "delta:granularity=head",
            "granularity is 'head', one of row, block, element is wanted",
        ),
        ("delta:block=8", "block is given and its granularity is row: leave block out"),
        ("delta:threshold=1", "threshold is given and its granularity is row"),
        ("delta:granularity=block,store=1", "store is given and its granularity is block"),
        ("delta:granularity=block,block=4", "delta's block is 4, 8 or 16 channels are wanted"),
        ("delta:granularity=block,block=big", "block is 'big', a whole number is wanted"),
        ("delta:granularity=element,block=8", "block is 8 and its granularity element"),
        ("delta:granularity=block,threshold=-1", "threshold is -1, 0 to 1,000,000 is wanted"),
        ("delta:granularity=block,threshold=nan", "threshold is nan"),
        ("delta:granularity=block,threshold=low", "threshold is 'low', a number is wanted"),
        ("delta:granularity=block,sparsity=0.96", "sparsity is 0.96, 0 to 0.95 is wanted"),
        ("delta:granularity=block,sparsity=0.5,threshold=1", "threshold and sparsity are given"),
        ("delta:granularity=block,sparsity=0.5,calibration=x", "sparsity and calibration are"),
        ("delta:granularity=block,refine=-1", "delta's refine is -1, 0"),
        ("delta:granularity=block,window=0", "delta's window is 0, 1 to 65,536 is wanted"),
        ("delta:granularity=block,sinks=-1", "delta's sinks is -1, 0 to 7 is wanted"),
        ("delta:granularity=block,prompts=bf16", "one of grouped, exact is wanted"),
        ("gem:then=delta:granularity=block", "dense or tidal is wanted"),
    ],
)
def test_wrong_policies_name_the_field(text: str, message: str, smollm2: Path) -> None:
    with pytest.raises(BadOption, match=message):
        parse_policy(text).resolve(read_spec(smollm2))


@pytest.fixture
def spec(smollm2: Path) -> ModelSpec:
    return read_spec(smollm2)


@pytest.fixture
def calibration(spec: ModelSpec) -> DeltaBlocksCalibration:
    squares = np.random.default_rng(0).uniform(0.5, 4, (30, 3, 64)).astype(np.float32)
    thresholds = np.full((30, 3), 0.75, np.float32)
    thresholds[7] = -1
    units = HeadThresholds.of_squares(squares, block=8, thresholds=thresholds)
    return DeltaBlocksCalibration(
        fingerprint=spec.fingerprint,
        model=spec.name,
        units=replace(units, sparsity=0.5),
        kl=0.01,
        target_kl=0.012,
        key_loss=0.02,
        target_key_loss=0.1,
        context=2048,
        keys_read=1.0,
        text="a text",
    )


def test_what_is_stated_is_of_every_unit(spec: ModelSpec) -> None:
    """A model that no calibration is for; with one, thresholds are multiples of its queries' channels."""
    calibrated = DeltaBlocks(granularity="element", threshold=0.25).resolve(spec).units
    assert calibrated is not None
    assert calibrated.query_rms != HeadThresholds.uniform(30, 3, 64, block=1).query_rms
    spec = replace(spec, fingerprint="0" * 32)
    fitted = DeltaBlocks(sparsity=0.5).resolve(spec)
    assert fitted.units == HeadThresholds.uniform(30, 3, 64, block=8, share=0.5)
    assert str(fitted) == "delta, blocks of 8, sparsity 50%, window 128 (stated)"
    states = fitted.key_states
    assert states is not None and (states.num_kv_head_params, states.block) == (90, 8)
    element = DeltaBlocks(granularity="element", threshold=0.25).resolve(spec)
    assert element.units == HeadThresholds.uniform(30, 3, 64, block=1, threshold=0.25)
    assert str(element) == "delta, elements, threshold 0.25, window 128 (stated)"


def test_a_calibration_is_kept_and_read_again(
    calibration: DeltaBlocksCalibration, spec: ModelSpec, tmp_path: Path
) -> None:
    path = save_blocks_calibration(calibration, tmp_path / "c.json")
    fitted = DeltaBlocks(calibration=path).resolve(spec)
    assert fitted.units == calibration.units
    assert "sparsity 50%, window 128 (calibrated: KL 0.010 at 2,048 tokens)" in str(fitted)
    assert fitted.key_states is not None and fitted.key_states.num_kv_head_params == 87
    other = DeltaBlocks(units=calibration.units).resolve(spec)
    assert fitted.cache_key == other.cache_key != replace(other, window=64).cache_key


def test_a_stated_threshold_is_a_multiple_of_the_calibrations_roots(
    calibration: DeltaBlocksCalibration, spec: ModelSpec, tmp_path: Path
) -> None:
    path = save_blocks_calibration(calibration, tmp_path / "c.json")
    fitted = DeltaBlocks(calibration=path, threshold=2.0).resolve(spec)
    assert fitted.units is not None
    thresholds, shares, query_rms = fitted.units.arrays()
    assert (np.delete(thresholds, 7, axis=0) == 2).all() and (thresholds[7] == -1).all()
    assert (shares == 1).all()
    assert np.array_equal(query_rms, calibration.units.arrays()[2])
    expected = np.sqrt(np.random.default_rng(0).uniform(0.5, 4, (30, 3, 64)))
    assert np.abs(query_rms - expected).max() <= 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "delta"}, "is of 'delta', one of 'delta-block8' is wanted"),
        ({"policy": "delta-block16"}, "is of 'delta-block16', one of 'delta-block8' is wanted"),
        ({"format": 7}, "format is 7, 2 is wanted"),
        ({"fingerprint": "0" * 32}, "of another model|fingerprint"),
        ({"thresholds": ["1 1 1"] * 29}, "thresholds is .*for each KV head of 30 layers"),
        ({"thresholds": ["1 1 -2"] * 30}, "thresholds is"),
        ({"thresholds": ["1 nan 1"] * 30}, "thresholds is"),
        ({"thresholds": ["1 1"] * 30}, "thresholds is"),
        ({"query_rms": ["1 x 1"] * 30}, "roots is"),
        ({"query_rms": ["1 -1 1"] * 30}, "roots is"),
        ({"scales": ["ff ff ff"] * 30}, "scales is .*64 bytes in hex"),
        ({"sparsity": "half"}, "sparsity is 'half'"),
        ({"kl": -1}, "kl is -1"),
    ],
)
def test_broken_calibrations_name_the_field(
    change: dict[str, Any],
    message: str,
    calibration: DeltaBlocksCalibration,
    spec: ModelSpec,
    tmp_path: Path,
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**calibration.to_dict(), **change}))
    with pytest.raises(CalibrationError, match=message):
        DeltaBlocks(calibration=path).resolve(spec)


def test_models_whose_keys_cannot_be_states_are_refused(spec: ModelSpec) -> None:
    with pytest.raises(BadOption, match=r"as many KV heads in every layer, .* has 2, 3"):
        DeltaBlocks(sparsity=0.5).resolve(replace(spec, num_kv_heads=(2, *spec.num_kv_heads[1:])))
    windowed = replace(spec, sliding_window=512, fingerprint="none")
    with pytest.raises(BadOption, match="calibrate --attention delta:granularity=block,block=8"):
        DeltaBlocks(sparsity=0.5).resolve(windowed)


def test_a_model_without_a_calibration_is_told(spec: ModelSpec) -> None:
    fitted = DeltaBlocks(block=16).resolve(replace(spec, fingerprint="none"))
    told = "delta, blocks of 16, sparsity 25%, window 128 (not calibrated for this model)"
    assert str(fitted) == told

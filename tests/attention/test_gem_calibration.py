"""Files of calibrations for gem, and what a policy takes from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowtide.attention.calibration import CalibrationError
from lowtide.attention.gem.calibrate import most_lost
from lowtide.attention.gem.policy import (
    Gem,
    GemCalibration,
    find_gem_calibration,
    load_gem_calibration,
    save_gem_calibration,
)
from lowtide.attention.tidal import policy as calibration_file
from lowtide.models.catalog import resolve
from lowtide.models.errors import BadOption
from lowtide.models.gguf.spec import read_spec
from lowtide.models.spec import ModelSpec


def made(spec: ModelSpec, **values: Any) -> GemCalibration:
    known = GemCalibration(
        fingerprint=spec.fingerprint,
        model=spec.name,
        layer=11,
        k=300,
        **Gem().rule_settings,
        num_asked=18,
        num_kept=18,
        num_dense_answered=16,
        num_answered=16,
        margin=0.4,
        context=4096,
        text="a text",
    )
    return replace(known, **values)


def test_what_was_saved_is_found_and_used(smollm2_spec: ModelSpec) -> None:
    path = save_gem_calibration(made(smollm2_spec))
    assert path.name == f"{smollm2_spec.fingerprint}.gem.json"
    assert find_gem_calibration(smollm2_spec) == made(smollm2_spec)
    fitted = Gem().resolve(smollm2_spec)
    assert (fitted.k, fitted.layer) == (300, 11)
    assert str(fitted) == (
        "gem, k 300, layer 11 (calibrated: 16 of 16 answers kept at 4,096 tokens), then dense"
    )
    assert str(Gem(k=500).resolve(smollm2_spec)) == (
        "gem, k 500, layer 11 (calibrated with k 300), then dense"
    )
    stated = Gem(layer=9, k=400).resolve(smollm2_spec)
    assert str(stated) == "gem, k 400, layer 9 (stated), then dense"


def test_where_settings_come_from_does_not_make_them_others(smollm2_spec: ModelSpec) -> None:
    save_gem_calibration(made(smollm2_spec))
    assert (
        Gem().resolve(smollm2_spec).cache_key
        == Gem(k=300, layer=11).resolve(smollm2_spec).cache_key
    )


def test_another_rule_has_no_use_for_it(smollm2_spec: ModelSpec, tmp_path: Path) -> None:
    path = save_gem_calibration(made(smollm2_spec))
    fitted = Gem(rows=1).resolve(smollm2_spec)
    assert (fitted.k, fitted.layer) == (512, 7)
    assert "(default layer: not calibrated for this model)" in str(fitted)
    with pytest.raises(BadOption, match="was made for another rule: leave rows, weights"):
        Gem(rows=1, calibration=path).resolve(smollm2_spec)


def test_without_one_a_model_with_sliding_windows_needs_a_layer(
    smollm2_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(calibration_file, "SHIPPED", tmp_path)
    windowed = replace(smollm2_spec, sliding_window=512)
    with pytest.raises(BadOption, match="or run lowtide calibrate --attention gem"):
        Gem().resolve(windowed)
    save_gem_calibration(made(smollm2_spec))
    assert Gem().resolve(windowed).layer == 11


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_calibrations_ship_for_the_named_models(name: str) -> None:
    spec = read_spec(resolve(name))
    found = find_gem_calibration(spec)
    assert found is not None and found.has_rule(Gem().rule_settings)
    assert found.num_kept == found.num_asked == 18 and found.margin >= 0.25
    lost = found.num_dense_answered - found.num_answered
    assert lost <= most_lost(found.num_dense_answered) and found.num_answered > 8
    fitted = Gem().resolve(spec)
    assert (fitted.layer, fitted.k) == (found.layer, found.k)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 2, "format is 2, 1 is wanted"),
        ("policy", "tidal", "is of 'tidal', one of 'gem' is wanted: name another"),
        ("layer", -1, "layer is -1, a whole number of 0 or more"),
        ("layer", 30, "layer is 30, one of .*'s layers, 0 to 29, is wanted"),
        ("layer", True, "layer is True"),
        ("k", 0, "k is 0, a whole number above 0"),
        ("weights", 3, "weights is 3, a text"),
        ("rows", "16", "rows is '16', a whole number"),
        ("margin", "much", "margin is 'much', a number"),
        ("margin", float("nan"), "margin is nan"),
        ("num_dense_answered", 0, "num_dense_answered is 0"),
        ("fingerprint", "0" * 32, "is of another model: its fingerprint is 000000000000"),
    ],
)
def test_a_wrong_field_is_named(
    field: str, value: Any, message: str, smollm2_spec: ModelSpec, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**made(smollm2_spec).to_dict(), field: value}))
    with pytest.raises(CalibrationError, match=message) as caught:
        load_gem_calibration(path, smollm2_spec)
    assert str(path) in str(caught.value)
    with pytest.raises(CalibrationError, match=message):
        Gem(calibration=path).resolve(smollm2_spec)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"policy": "gem"}'])
def test_broken_files(text: str, smollm2_spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match="run lowtide calibrate again"):
        load_gem_calibration(path, smollm2_spec)


def test_a_broken_file_is_in_nobodys_way_who_states_everything(smollm2_spec: ModelSpec) -> None:
    path = save_gem_calibration(made(smollm2_spec))
    path.write_text("{")
    assert Gem(k=400, layer=9).resolve(smollm2_spec).layer == 9
    with pytest.raises(CalibrationError, match="is no JSON"):
        Gem().resolve(smollm2_spec)

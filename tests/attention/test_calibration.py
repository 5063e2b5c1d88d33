"""Calibration files: found by fingerprint, checked field by field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowtide.attention.calibration import CalibrationError
from lowtide.attention.tidal import policy as calibration_file
from lowtide.attention.tidal.policy import (
    Tidal,
    TidalCalibration,
    find_tidal_calibration,
    load_tidal_calibration,
    save_tidal_calibration,
)
from lowtide.models.catalog import resolve
from lowtide.models.gguf.spec import read_spec
from lowtide.models.spec import ModelSpec


def made(spec: ModelSpec, **values: Any) -> TidalCalibration:
    known = TidalCalibration(
        fingerprint=spec.fingerprint,
        model=spec.name,
        k=300,
        selection_layers=(2, 9),
        kl=0.01,
        target_kl=0.015,
        key_loss=0.02,
        target_key_loss=0.05,
        context=4096,
        keys_read=0.3,
        text="a text",
    )
    return replace(known, **values)


def test_what_was_saved_is_found_and_used(smollm2_spec: ModelSpec) -> None:
    path = save_tidal_calibration(made(smollm2_spec))
    assert path.name == f"{smollm2_spec.fingerprint}.json"
    assert find_tidal_calibration(smollm2_spec) == made(smollm2_spec)
    fitted = Tidal().resolve(smollm2_spec)
    assert (fitted.k, fitted.selection_layers) == (300, (2, 9))
    assert str(fitted) == (
        "tidal, k 300, selection layers 2+9 (calibrated: KL 0.010 at 4,096 tokens)"
    )
    stated = Tidal(k=500).resolve(smollm2_spec)
    assert (stated.k, stated.selection_layers) == (500, (2, 9))


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_calibrations_ship_for_the_named_models(name: str) -> None:
    spec = read_spec(resolve(name))
    found = find_tidal_calibration(spec)
    assert found is not None
    assert found.kl <= found.target_kl <= 0.02
    assert Tidal().resolve(spec).selection_layers == found.selection_layers


def test_without_one_the_default_is_named(
    smollm2_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(calibration_file, "SHIPPED", tmp_path)
    fitted = Tidal().resolve(smollm2_spec)
    assert (fitted.k, fitted.selection_layers) == (1024, (2, 8, 14, 20))
    assert "default layers: not calibrated for this model" in str(fitted)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 1, "format is 1, 2 is wanted"),
        ("policy", "gem", "is of 'gem', one of 'tidal' is wanted: name another file"),
        ("selection_layers", [], "selection_layers is \\[\\], a list of layer numbers"),
        ("selection_layers", ["2"], "selection_layers"),
        ("selection_layers", [9, 2], "each layer once, in order"),
        ("selection_layers", [2, 30], "selection_layers name layer 30, .* has 30 layers"),
        ("k", 0, "k is 0, a whole number above 0"),
        ("k", True, "k is True"),
        ("kl", "low", "kl is 'low', a number"),
        ("kl", float("nan"), "kl is nan"),
        ("fingerprint", None, "fingerprint is None, a text"),
        ("fingerprint", "0" * 32, "is of another model: its fingerprint is 000000000000"),
    ],
)
def test_a_wrong_field_is_named(
    field: str, value: Any, message: str, smollm2_spec: ModelSpec, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**made(smollm2_spec).to_dict(), field: value}))
    with pytest.raises(CalibrationError, match=message) as caught:
        load_tidal_calibration(path, smollm2_spec)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"format": 1}'])
def test_broken_files(text: str, smollm2_spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match="run lowtide calibrate again"):
        load_tidal_calibration(path, smollm2_spec)
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_tidal_calibration(tmp_path / "none.json", smollm2_spec)


def test_a_folder_that_cannot_be_written(smollm2_spec: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="cannot be written"):
        save_tidal_calibration(made(smollm2_spec), tmp_path / "file" / "c.json")


def test_quantisations_share_a_fingerprint_and_other_models_do_not(tmp_path: Path) -> None:
    from gguf_files import write_model

    specs = [
        read_spec(write_model(tmp_path / f"{name}.gguf", **values))
        for name, values in {
            "first": {},
            "same": {"context": 512},
            "wider": {"width": 128},
            "deeper": {"layers": 3},
        }.items()
    ]
    first, same, *others = [spec.fingerprint for spec in specs]
    assert first == same
    assert len({first, *others}) == 3

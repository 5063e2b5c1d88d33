"""Calibration files of all policies: saved, found by fingerprint and policy, and checked field by field."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide.attention import calibration as calibration_file
from lowtide.attention.calibration import (
    Calibration,
    CalibrationError,
    find_calibration,
    load_calibration,
    save_calibration,
)
from lowtide.attention.delta.blocks import LEFT_DENSE, HeadThresholds
from lowtide.attention.delta.groups import HeadGroups
from lowtide.attention.delta.head_params import PAGE_KEYS
from lowtide.attention.delta.policy import Delta
from lowtide.attention.gem.calibrate import most_lost
from lowtide.attention.gem.policy import Gem
from lowtide.attention.policy import AttentionPolicy
from lowtide.attention.tidal.policy import Tidal
from lowtide.models.catalog import resolve
from lowtide.models.errors import BadOption
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.spec import ModelSpec

DIVERGENCE = {
    "kl": 0.01,
    "target_kl": 0.015,
    "key_loss": 0.02,
    "target_key_loss": 0.05,
    "keys_read": 0.3,
    "sparsity": 0.5,
}
ANSWERS = {
    "num_asked": 18,
    "num_kept": 18,
    "num_dense_answered": 16,
    "num_answered": 16,
    "margin": 0.4,
}
RULE = {
    "rows": 16,
    "weights": "softmax",
    "heads": "max",
    "pool": "max",
    "pool_size": 33,
    "first": 4,
    "last": 64,
}
GROUPS = replace(HeadGroups.uniform(30, 3, 64, 24), score_bias=((0.0, 0.25, 12.5),) * 30)


def thresholds() -> HeadThresholds:
    squares = np.random.default_rng(0).uniform(0.5, 4, (30, 3, 64)).astype(np.float32)
    numbers = np.full((30, 3), 0.75, np.float32)
    numbers[7] = -1
    return replace(HeadThresholds.of_squares(squares, block=8, thresholds=numbers), sparsity=0.5)


@dataclass(frozen=True)
class Case:
    """A policy with its key, and what a file for the default model has."""

    key: str
    policy: AttentionPolicy
    metrics: dict[str, float]
    params: dict[str, Any]

    def calibration(self, spec: ModelSpec) -> Calibration:
        return Calibration(
            policy=self.key,
            fingerprint=spec.fingerprint,
            model=spec.name,
            context=4096,
            text="a text",
            metrics=self.metrics,
            params=self.params,
        )

    def loaded(self, path: Path, spec: ModelSpec) -> AttentionPolicy:
        return replace(self.policy, calibration=path).resolve(spec)  # type: ignore[type-var]


TIDAL = Case("tidal", Tidal(), DIVERGENCE, {"k": 300, "selection_layers": [2, 9]})
GEM = Case("gem", Gem(), ANSWERS, {"layer": 11, "k": 300, **RULE})
TOKENS = Case("delta-token", Delta(), DIVERGENCE, GROUPS.to_params())
BLOCKS = Case("delta-block8", Delta(granularity="block"), DIVERGENCE, thresholds().to_params())
CASES = {case.key: case for case in (TIDAL, GEM, TOKENS, BLOCKS)}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_a_saved_calibration_is_found(case: Case, smollm2_spec: ModelSpec, tmp_path: Path) -> None:
    calibration = case.calibration(smollm2_spec)
    path = save_calibration(calibration)
    assert path.name == f"{smollm2_spec.fingerprint}.{case.key}.json"
    assert find_calibration(case.key, smollm2_spec) == calibration
    assert str(case.policy.resolve(smollm2_spec)) == str(case.loaded(path, smollm2_spec))
    elsewhere = save_calibration(calibration, tmp_path / "c.json")
    assert load_calibration(elsewhere, case.key, smollm2_spec) == calibration


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (TIDAL, "tidal, k 300, selection layers 2+9 (calibrated: KL 0.010 at 4,096 tokens)"),
        (
            GEM,
            "gem, k 300, layer 11 (calibrated: 16 of 16 answers kept at 4,096 tokens), then dense",
        ),
        (
            TOKENS,
            "delta, sparsity 62%, window 128 (calibrated: KL 0.010 at 4,096 tokens)",
        ),
        (
            BLOCKS,
            "delta, blocks of 8, sparsity 50%, window 128 (calibrated: KL 0.010 at 4,096 tokens)",
        ),
    ],
    ids=lambda value: getattr(value, "key", ""),
)
def test_a_policy_uses_the_calibration_and_describes_it(
    case: Case, text: str, smollm2_spec: ModelSpec
) -> None:
    save_calibration(case.calibration(smollm2_spec))
    assert str(case.policy.resolve(smollm2_spec)) == text


@pytest.mark.parametrize(
    ("case", "same"),
    [
        (TIDAL, Tidal(k=300, selection_layers=(2, 9))),
        (GEM, Gem(k=300, layer=11)),
        (TOKENS, Delta(params=GROUPS)),
        (BLOCKS, Delta(granularity="block", params=thresholds())),
    ],
    ids=lambda value: getattr(value, "key", ""),
)
def test_the_source_of_settings_is_not_in_the_cache_key(
    case: Case, same: AttentionPolicy, smollm2_spec: ModelSpec
) -> None:
    save_calibration(case.calibration(smollm2_spec))
    fitted, other = case.policy.resolve(smollm2_spec), same.resolve(smollm2_spec)
    assert fitted.cache_key == other.cache_key
    changed = {"recent": 32} if case is TIDAL else {"rows": 8} if case is GEM else {"window": 64}
    assert replace(other, **changed).cache_key != other.cache_key  # type: ignore[type-var]


def test_settings_of_the_user_come_first(smollm2_spec: ModelSpec) -> None:
    save_calibration(TIDAL.calibration(smollm2_spec))
    save_calibration(GEM.calibration(smollm2_spec))
    tidal = Tidal(k=500).resolve(smollm2_spec)
    assert (tidal.k, tidal.selection_layers) == (500, (2, 9))
    assert str(Gem(k=500).resolve(smollm2_spec)) == (
        "gem, k 500, layer 11 (calibrated with k 300), then dense"
    )
    gem = Gem(layer=9, k=400).resolve(smollm2_spec)
    assert str(gem) == "gem, k 400, layer 9 (user), then dense"


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_calibrations_ship_for_the_named_models(name: str) -> None:
    spec = read_spec(resolve(name))
    tidal, gem = find_calibration("tidal", spec), find_calibration("gem", spec)
    assert tidal is not None and tidal.metric("kl") <= tidal.metric("target_kl") <= 0.02
    layers = Tidal().resolve(spec).selection_layers
    assert layers is not None and list(layers) == tidal.params["selection_layers"]
    assert gem is not None and gem.metric("num_kept") == gem.metric("num_asked") == 18
    assert gem.metric("margin") >= 0.25 and gem.metric("num_answered") > 8
    lost = gem.metric("num_dense_answered") - gem.metric("num_answered")
    assert lost <= most_lost(int(gem.metric("num_dense_answered")))
    fitted = Gem().resolve(spec)
    assert (fitted.layer, fitted.k) == (gem.params["layer"], gem.params["k"])


def test_every_shipped_file_is_named_after_its_model_and_policy() -> None:
    files = list(calibration_file.SHIPPED.glob("*.json"))
    assert len(files) == 8
    for path in files:
        values = json.loads(path.read_text())
        assert path.name == f"{values['fingerprint']}.{values['policy']}.json"


def test_a_model_without_a_calibration_is_described_so(
    smollm2_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(calibration_file, "SHIPPED", tmp_path)
    tidal = Tidal().resolve(smollm2_spec)
    assert (tidal.k, tidal.selection_layers) == (1024, (2, 8, 14, 20))
    assert "default layers: not calibrated for this model" in str(tidal)
    assert str(Gem().resolve(smollm2_spec)) == (
        "gem, k 512, layer 7 (default layer: not calibrated for this model), then dense"
    )
    assert str(Delta(granularity="block", block=16).resolve(smollm2_spec)) == (
        "delta, blocks of 16, sparsity 25%, window 128 (not calibrated for this model)"
    )


def test_gem_needs_a_calibration_or_a_layer_where_it_is_not_known_which_layers_slide(
    smollm2_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(calibration_file, "SHIPPED", tmp_path)
    windowed = replace(smollm2_spec, sliding_window=512)
    with pytest.raises(BadOption, match="or run lowtide calibrate --attention gem"):
        Gem().resolve(windowed)
    assert "stay dense" not in str(Delta(granularity="element", threshold=1).resolve(windowed))
    save_calibration(GEM.calibration(smollm2_spec))
    assert Gem().resolve(windowed).layer == 11


def test_gem_does_not_use_the_calibration_of_another_rule(smollm2_spec: ModelSpec) -> None:
    path = save_calibration(GEM.calibration(smollm2_spec))
    fitted = Gem(rows=1).resolve(smollm2_spec)
    assert (fitted.k, fitted.layer) == (512, 7)
    with pytest.raises(BadOption, match="was made with another rule: leave rows, weights"):
        Gem(rows=1, calibration=path).resolve(smollm2_spec)


def test_a_threshold_of_the_user_keeps_the_calibrated_queries(
    smollm2_spec: ModelSpec, tmp_path: Path
) -> None:
    path = save_calibration(BLOCKS.calibration(smollm2_spec), tmp_path / "c.json")
    policy = Delta(granularity="block", calibration=path, threshold=2.0).resolve(smollm2_spec)
    assert isinstance(policy.params, HeadThresholds)
    numbers, shares, query_rms = policy.params.arrays()
    assert (np.delete(numbers, 7, axis=0) == 2).all() and (numbers[7] == -1).all()
    assert (shares == 1).all()
    assert np.array_equal(query_rms, thresholds().arrays()[2])
    expected = np.sqrt(np.random.default_rng(0).uniform(0.5, 4, (30, 3, 64)))
    assert np.abs(query_rms - expected).max() <= 0.01


ANY_POLICY = [
    ("format", 2, "format is 2; it must be 3"),
    ("policy", "other", "is for 'other', not for"),
    ("policy", None, "policy is None"),
    ("context", 0, "context is 0; it must be a whole number of 1 or more"),
    ("metrics", [], r"metrics is \[\]; it must be an object"),
    ("params", None, "params is None; it must be an object"),
    ("fingerprint", None, "fingerprint is None; it must be a text"),
    ("fingerprint", "0" * 32, "belongs to another model: its fingerprint is 000000000000"),
]


@pytest.mark.parametrize(("field", "value", "message"), ANY_POLICY)
def test_an_error_names_the_file_and_the_field(
    case: Case, field: str, value: Any, message: str, smollm2_spec: ModelSpec, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**case.calibration(smollm2_spec).to_dict(), field: value}))
    with pytest.raises(CalibrationError, match=message) as caught:
        case.loaded(path, smollm2_spec)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("case", "field", "value", "message"),
    [
        (
            TIDAL,
            "params.selection_layers",
            [],
            r"selection_layers is \[\]; .*a list of layer numbers",
        ),
        (TIDAL, "params.selection_layers", ["2"], "selection_layers is"),
        (TIDAL, "params.selection_layers", [9, 2], "each once, in order"),
        (TIDAL, "params.selection_layers", [2, 30], "layers of .*, 0 to 29"),
        (TIDAL, "params.k", 0, "k is 0; it must be a whole number of 1 or more"),
        (TIDAL, "params.k", True, "k is True"),
        (TIDAL, "metrics.kl", "low", "metrics.kl is 'low'; it must be a number"),
        (TIDAL, "metrics.kl", float("nan"), "metrics.kl is nan"),
        (GEM, "params.layer", -1, "layer is -1; it must be a whole number of 0 or more"),
        (GEM, "params.layer", 30, "layer is 30; it must be a layer of .*, 0 to 29"),
        (GEM, "params.layer", True, "layer is True"),
        (GEM, "params.k", 0, "k is 0; it must be a whole number"),
        (GEM, "params.weights", 3, "weights is 3; it must be a text"),
        (GEM, "params.rows", "16", "rows is '16'; it must be a whole number"),
        (GEM, "metrics.num_answered", "all", "num_answered is 'all'; it must be a number"),
        (TOKENS, "params.num_groups", ["8 8 8"] * 29, "8 to 64 for each KV head of 30 layers"),
        (TOKENS, "params.num_groups", ["8 8 7"] * 30, "num_groups is"),
        (TOKENS, "params.num_groups", ["8 8"] * 30, "num_groups is"),
        (TOKENS, "params.num_groups", ["8 8 x"] * 30, "num_groups is"),
        (TOKENS, "params.num_groups", "8", "num_groups is '8'"),
        (TOKENS, "params.score_bias", ["0 0 -1"] * 30, "score_bias is .*numbers from 0 to 1e"),
        (TOKENS, "params.score_bias", ["0 0"] * 30, "score_bias is"),
        (TOKENS, "params.scales", ["zz zz zz"] * 30, "scales is .*64 bytes in hex"),
        (TOKENS, "params.scales", ["ff ff ff"] * 30, "scales is"),
        (BLOCKS, "params.thresholds", ["1 1 1"] * 29, "thresholds is .*for each KV head of 30"),
        (BLOCKS, "params.thresholds", ["1 1 -2"] * 30, "thresholds is"),
        (BLOCKS, "params.thresholds", ["1 nan 1"] * 30, "thresholds is"),
        (BLOCKS, "params.query_rms", ["1 x 1"] * 30, "query_rms is"),
        (BLOCKS, "params.query_rms", ["1 -1 1"] * 30, "query_rms is"),
        (BLOCKS, "params.scales", ["ff ff ff"] * 30, "scales is .*64 bytes in hex"),
        (BLOCKS, "metrics.sparsity", "half", "sparsity is 'half'"),
    ],
    ids=lambda value: getattr(value, "key", None),
)
def test_a_policy_checks_its_params_and_metrics(
    case: Case, field: str, value: Any, message: str, smollm2_spec: ModelSpec, tmp_path: Path
) -> None:
    values = copy.deepcopy(case.calibration(smollm2_spec).to_dict())
    part, name = field.split(".")
    values[part][name] = value
    path = tmp_path / "c.json"
    path.write_text(json.dumps(values))
    with pytest.raises(CalibrationError, match=message) as caught:
        case.loaded(path, smollm2_spec)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"format": 3}'])
def test_damaged_files(case: Case, text: str, smollm2_spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match="run lowtide calibrate again"):
        case.loaded(path, smollm2_spec)
    with pytest.raises(CalibrationError, match="cannot be read"):
        case.loaded(tmp_path / "none.json", smollm2_spec)


def test_a_damaged_file_is_not_read_if_nothing_is_needed_of_it(smollm2_spec: ModelSpec) -> None:
    path = save_calibration(GEM.calibration(smollm2_spec))
    path.write_text("{")
    assert Gem(k=400, layer=9).resolve(smollm2_spec).layer == 9
    with pytest.raises(CalibrationError, match="is not JSON"):
        Gem().resolve(smollm2_spec)


def test_a_folder_that_cannot_be_written(smollm2_spec: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="cannot be written"):
        save_calibration(TIDAL.calibration(smollm2_spec), tmp_path / "file" / "c.json")


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


def test_layers_that_slide_stay_dense_without_a_calibration(
    smollm2_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(calibration_file, "SHIPPED", tmp_path)
    sliding = tuple(layer for layer in range(smollm2_spec.num_layers) if (layer + 1) % 6)
    windowed = replace(smollm2_spec, sliding_window=512, sliding_layers=sliding)
    by_token = Delta().resolve(windowed)
    assert "25 layers with a sliding window stay dense" in str(by_token)
    assert isinstance(by_token.params, HeadGroups)
    dense = [min(counts) == PAGE_KEYS for counts in by_token.params.num_groups]
    assert [layer for layer, is_dense in enumerate(dense) if is_dense] == list(sliding)
    by_block = Delta(granularity="block").resolve(windowed)
    assert isinstance(by_block.params, HeadThresholds)
    dense = [max(thresholds) == LEFT_DENSE for thresholds in by_block.params.thresholds]
    assert [layer for layer, is_dense in enumerate(dense) if is_dense] == list(sliding)
    assert Gem().resolve(windowed).layer == 11  # the first full layer behind a quarter
    none = replace(windowed, sliding_layers=tuple(range(windowed.num_layers)))
    with pytest.raises(BadOption, match="needs a layer that sees the whole prompt"):
        Gem().resolve(none)

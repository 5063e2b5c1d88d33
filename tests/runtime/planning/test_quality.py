"""`quality`: the fastest calibrated policy inside a limit, said with its distance; exact without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_model

from lowtide import Runtime
from lowtide.attention.calibration import Calibration, save_calibration
from lowtide.models.errors import BadOption
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.spec import ModelSpec
from lowtide.runtime.backends.config import LoadConfig
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.planning.expected import ExpectedPrompt
from lowtide.runtime.planning.plan import plan_reference, plan_spec
from lowtide.runtime.planning.quality import ExpectedLength, choose, saving

LONG = ExpectedLength(prompt_tokens=3000, answer_tokens=1000)
RULE = {"rows": 16, "weights": "softmax", "heads": "max", "pool": "max", "pool_size": 33}


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    """Weights that are small beside the KV cache of a few thousand tokens."""
    return read_spec(write_model(tmp_path / "m.gguf", layers=8, context=8192))


def calibrate(spec: ModelSpec, policy: str, metrics: dict[str, float], params: Any) -> None:
    save_calibration(
        Calibration(
            policy=policy,
            fingerprint=spec.fingerprint,
            model=spec.name,
            context=4096,
            text="a test",
            metrics=metrics,
            params=params,
        )
    )


def calibrate_tidal(spec: ModelSpec, kl: float, k: int = 256) -> None:
    calibrate(spec, "tidal", {"kl": kl}, {"k": k, "selection_layers": [2]})


def calibrate_gem(spec: ModelSpec) -> None:
    metrics = {"num_answered": 11, "num_dense_answered": 12}
    params = {"layer": 2, "k": 256, "first": 4, "last": 64, **RULE}
    calibrate(spec, "gem", metrics, params)


@pytest.mark.parametrize("quality", ["high", "fast"])
def test_without_a_calibration_it_stays_exact_and_says_how_to_make_one(
    spec: ModelSpec, quality: str
) -> None:
    chosen = choose(spec, quality, LONG)
    assert chosen.found is None and chosen.time_share == 1
    assert (
        "stays exact" in chosen.sentence and "lowtide calibrate --target-kl 0.0" in chosen.sentence
    )


@pytest.mark.parametrize(
    ("kl", "high", "fast"), [(0.004, True, True), (0.012, False, True), (0.03, False, False)]
)
def test_the_limit_decides(spec: ModelSpec, kl: float, high: bool, fast: bool) -> None:
    calibrate_tidal(spec, kl)
    assert (choose(spec, "high", LONG).found is not None) == high
    found = choose(spec, "fast", LONG)
    assert (found.found is not None) == fast
    if fast:
        assert f"KL {kl:.4f} at 4,096 tokens" in found.sentence and found.time_share < 0.95
        assert found.to_dict()["kl"] == kl


def test_a_short_text_stays_exact(spec: ModelSpec) -> None:
    calibrate_tidal(spec, 0.001)
    short = choose(spec, "fast", ExpectedLength(prompt_tokens=100, answer_tokens=100))
    assert short.found is None and "no calibrated policy saves time at 200 tokens" in short.sentence


def test_the_shortest_predicted_time_wins(spec: ModelSpec) -> None:
    calibrate_tidal(spec, 0.01, k=2500)
    slow = choose(spec, "fast", LONG)
    calibrate_gem(spec)
    question = ExpectedLength(prompt_tokens=3000, answer_tokens=1000, is_question=True)
    fast = choose(spec, "fast", question)
    assert fast.found is not None and fast.found.policy.name == "gem"
    assert "11 of 12 answers kept" in fast.sentence
    assert slow.found is None or fast.time_share < slow.time_share
    for quality, length in (("high", question), ("fast", LONG)):
        found = choose(spec, quality, length).found
        assert found is None or found.policy.name != "gem"


def test_the_plan_runs_what_was_chosen(spec: ModelSpec) -> None:
    calibrate_tidal(spec, 0.01)
    for quality, policy in (("exact", "dense"), ("high", "dense"), ("fast", "tidal")):
        config = LoadConfig(memory="2GiB", threads=1, quality=quality, context=4096)
        planned = plan_reference(spec.path, config)
        assert planned.policy.name == policy
        assert (planned.quality is None) == (quality == "exact")
        if planned.quality is not None:
            assert (planned.quality.found is not None) == (policy == "tidal")
    with Runtime.open(spec.path, memory="2GiB", threads=1, quality="fast", context=4096) as runtime:
        stats = runtime.generate("a b c", max_tokens=4, temperature=0).stats
        assert stats.attention.startswith("tidal")


def test_gem_is_for_questions_whose_prompt_is_known(spec: ModelSpec) -> None:
    calibrate_gem(spec)
    config = LoadConfig(memory="2GiB", threads=1, quality="fast", context=8192)
    params = SamplingParams(max_tokens=64)
    text = "word7 " * 800
    question = ExpectedPrompt(messages=[{"role": "user", "content": text}], params=params)
    assert plan_spec(spec, config, prompt=question).policy.name == "gem"
    for prompt in (ExpectedPrompt(text=text, params=params), None):
        assert plan_spec(spec, config, prompt=prompt).policy.name == "dense"


def test_a_budget_without_room_for_the_policy_stays_exact(spec: ModelSpec) -> None:
    calibrate_tidal(spec, 0.01)
    options: dict[str, Any] = {"threads": 1, "context": 8192, "kv_type": "f16"}
    bound = plan_reference(spec.path, LoadConfig(memory="2GiB", **options)).plan.lower_bound_bytes
    small = plan_reference(spec.path, LoadConfig(memory=bound, quality="fast", **options))
    assert small.policy.name in ("dense", "llama")
    assert small.quality is not None and "stays exact, because" in small.quality.sentence


@pytest.mark.parametrize("options", [{"attention": "tidal"}, {"attention": "dense"}])
def test_quality_and_a_policy_exclude_each_other(options: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="quality='high' chooses the attention policy"):
        LoadConfig(quality="high", **options)


def test_a_wrong_quality_names_the_possible_ones() -> None:
    with pytest.raises(BadOption, match="quality is 'best'; it must be exact, high or fast"):
        LoadConfig(quality="best")


def test_the_saving_is_said_once_a_model_with_both_numbers(spec: ModelSpec) -> None:
    config = LoadConfig(memory="2GiB", threads=1)
    planned = plan_reference(spec.path, config)
    assert saving(planned, 3000, 1000) is None, "no calibration gives the numbers"
    calibrate_tidal(spec, 0.01)
    assert saving(planned, 100, 100) is None, "a short answer"
    for other in ({"reference": True}, {"quality": "fast"}):
        approximate = plan_reference(spec.path, LoadConfig(memory="2GiB", threads=1, **other))
        assert saving(approximate, 3000, 1000) is None
    calibrate_gem(spec)
    said = saving(planned, 3000, 1000)
    assert said is not None and "% of the time" in said and "KL 0.0100 at 4,096 tokens" in said
    assert saving(planned, 3000, 1000) is None


def test_the_saving_of_a_question_counts_gem(spec: ModelSpec) -> None:
    planned = plan_reference(spec.path, LoadConfig(memory="2GiB", threads=1))
    calibrate_gem(spec)
    assert saving(planned, 3000, 50) is None
    said = saving(planned, 3000, 50, is_question=True)
    assert said is not None and "with gem: 11 of 12 answers kept at 4,096 tokens" in said

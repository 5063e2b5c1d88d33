"""Evaluation on the default model, small: a sparse policy, a prompt filter, and wrong uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lowtide.attention.evaluation import questions
from lowtide.attention.gem.policy import Gem
from lowtide.attention.tidal.policy import Tidal
from lowtide.models.errors import BadOption
from lowtide.models.spec import ModelSpec
from lowtide.runtime.evaluation.evaluate import evaluate, evaluation_config
from lowtide.runtime.evaluation.report import QuestionCounts
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference


def load(path: Path, attention: str, compared_tokens: int) -> Engine:
    config = LoadConfig(
        memory="8GiB",
        context=1100,
        threads=1,
        attention=attention,
        compared_tokens=compared_tokens,
    )
    return Engine(plan_reference(path, config))


@pytest.fixture(scope="module")
def tidal(smollm2: Path) -> Iterator[Engine]:
    engine = load(smollm2, "tidal:k=300,layers=2+8+14+20", compared_tokens=64)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def dense(smollm2: Path) -> Iterator[Engine]:
    engine = load(smollm2, "dense", compared_tokens=1)
    yield engine
    engine.close()


@pytest.fixture
def one_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "DEPTHS", (0.5,))


def test_a_policy_on_a_text_and_on_passkeys(tidal: Engine) -> None:
    notes: list[str] = []
    found = evaluate(tidal, context=1000, windows=2, passkey_lengths=(500,), progress=notes.append)
    values = found.to_dict()
    assert 0 < values["kl"] < 0.1
    assert values["top1_agreement"] > 0.8
    assert abs(values["nll_change"]) < 0.1
    assert values["tokens"] == 128 and [p["depth"] for p in values["places"]] == [750, 1000]
    assert 0.3 < values["keys_read"] < 0.6
    assert values["passkeys"]["asked"] == 3 == len(values["passkeys"]["cases"])
    assert values["passkeys"]["dense"] >= 2 and values["passkeys"]["found"] >= 2
    assert values["text"] == "Python's own language reference"
    assert len(notes) == 5


def test_a_text_of_the_user(tidal: Engine, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The tide comes in. " * 300)
    found = evaluate(tidal, context=800, text=text, windows=1, passkey_lengths=())
    assert found.passkeys == () and found.text == str(text)
    assert found.distance.dense_nll_sum / 64 < 0.1  # the model predicts a repetition


def test_wrong_use_of_a_policy(tidal: Engine, smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="it must be between 256 and 1035"):
        evaluate(tidal, context=1090)
    with pytest.raises(BadOption, match="it must be between 256 and"):
        evaluate(tidal, context=10)
    with pytest.raises(BadOption, match=r"cannot read .*nowhere\.txt"):
        evaluate(tidal, context=800, text=tmp_path / "nowhere.txt")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(BadOption, match="has 3 tokens, but 865 are needed: use a longer text"):
        evaluate(tidal, context=800, text=short)
    engine = load(smollm2, "llama", compared_tokens=0)
    with pytest.raises(BadOption, match="attention is llama.cpp's own"):
        evaluate(engine, context=800)
    engine.close()


@pytest.mark.usefixtures("one_depth")
def test_a_filter_on_questions_and_on_a_text(dense: Engine) -> None:
    policy = Gem(k=256, layer=17, min_prompt=0).resolve(dense.planned.spec)
    notes: list[str] = []
    found = evaluate(
        dense,
        policy,
        context=1000,
        windows=1,
        kinds=("pass key", "fact", "counting"),
        progress=notes.append,
    )
    assert found.filtered is not None
    counts = QuestionCounts.of(found.filtered.of_kinds(("pass key", "fact")))
    assert counts.asked == counts.retained == 4 and counts.dense >= 3
    assert counts.found == counts.dense
    values = found.to_dict()
    assert values["questions"]["asked"] == 4 and values["hard_questions"]["asked"] == 2
    cases = values["questions"]["cases"]
    assert {case["length"] for case in cases} == {500, 1000}
    assert all((case["needed_k"] <= 256) <= case["retained"] for case in cases)
    assert values["tokens"] == 64 and 0.5 < values["dense_nll"] < 5
    assert 0 < values["nll_change"] < 2  # the continuation of a text gets worse
    assert values["attention"].startswith("gem, k 256, layer 17")
    assert len(notes) == 1 + 6 + 1


@pytest.mark.usefixtures("one_depth")
def test_a_layer_that_does_not_attend_to_the_answer_retains_little(dense: Engine) -> None:
    policy = Gem(k=128, layer=0, min_prompt=0).resolve(dense.planned.spec)
    found = evaluate(dense, policy, context=1000, windows=1, kinds=("fact",)).filtered
    assert found is not None
    counts = QuestionCounts.of(found.answers)
    assert counts.retained < counts.asked == 2
    assert all(answer.needed_k > 128 for answer in found.answers if not answer.retained)


def test_wrong_use_of_a_filter(dense: Engine, tmp_path: Path) -> None:
    spec = dense.planned.spec
    with pytest.raises(BadOption, match="half of it are not filtered .gem, k 512"):
        evaluate(dense, Gem(k=512, layer=7).resolve(spec), context=1000)
    policy = Gem(k=100, layer=7, min_prompt=0).resolve(spec)
    with pytest.raises(BadOption, match="it must be at most 1035"):
        evaluate(dense, policy, context=1090)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(BadOption, match="use a longer text"):
        evaluate(dense, policy, context=800, text=short)


def test_how_a_model_is_loaded_for_an_evaluation(smollm2_spec: ModelSpec) -> None:
    plain = LoadConfig(attention="tidal")
    config = evaluation_config(plain, plain.policy(smollm2_spec), 1000)
    assert (config.context, config.compared_tokens, config.attention) == (1065, 64, "tidal")
    gem = Gem(then=Tidal()).resolve(smollm2_spec)
    config = evaluation_config(LoadConfig(attention="gem"), gem, 1000)
    assert config.policy(smollm2_spec).name == "tidal" and config.compared_tokens == 1
    assert config.attention_memory == replace(gem.memory, filter_prefill=None)

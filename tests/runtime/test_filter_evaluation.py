"""What gem keeps and answers on the default model, small, and wrong uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lowtide.attention.evaluation import questions
from lowtide.attention.gem.policy import Gem
from lowtide.models.errors import BadOption
from lowtide.runtime.evaluation.prompt_filter import Counts, evaluate_filter
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> Iterator[Engine]:
    options = LoadConfig(
        memory="8GiB", context=1100, threads=1, attention="dense", compared_tokens=1
    )
    opened = Engine(plan_reference(smollm2, options))
    yield opened
    opened.close()


@pytest.fixture
def one_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "DEPTHS", (0.5,))


@pytest.mark.usefixtures("one_depth")
def test_a_filter_on_questions_and_on_a_text(loaded: Engine) -> None:
    policy = Gem(k=256, layer=17, min_prompt=0).resolve(loaded.planned.spec)
    said: list[str] = []
    found = evaluate_filter(
        loaded,
        policy,
        context=1000,
        windows=1,
        kinds=("pass key", "fact", "counting"),
        progress=said.append,
    )
    counts = Counts.of(found.of_kinds(("pass key", "fact")))
    assert counts.asked == counts.kept == 4 and counts.dense >= 3
    assert counts.found == counts.dense
    values = found.to_dict()
    assert values["questions"]["asked"] == 4 and values["hard_questions"]["asked"] == 2
    assert {case["length"] for case in values["questions"]["cases"]} == {500, 1000}
    assert all((case["needed_k"] <= 256) <= case["kept"] for case in values["questions"]["cases"])
    assert values["tokens"] == 64 and 0.5 < values["dense_nll"] < 5
    assert 0 < values["nll_change"] < 2  # a text goes on worse
    assert values["attention"].startswith("gem, k 256, layer 17 (user)")
    assert len(said) == 1 + 6 + 1


@pytest.mark.usefixtures("one_depth")
def test_a_layer_that_does_not_look_for_it_keeps_little(loaded: Engine) -> None:
    policy = Gem(k=128, layer=0, min_prompt=0).resolve(loaded.planned.spec)
    found = evaluate_filter(loaded, policy, context=1000, windows=1, kinds=("fact",))
    counts = Counts.of(found.answers)
    assert counts.kept < counts.asked == 2
    assert all(answer.needed_k > 128 for answer in found.answers if not answer.kept)


def test_wrong_use(loaded: Engine, tmp_path: Path) -> None:
    spec = loaded.planned.spec
    with pytest.raises(
        BadOption, match="prompts of half of it are read whole .k 512, min_prompt 1024"
    ):
        evaluate_filter(loaded, Gem(k=512, layer=7).resolve(spec), context=1000)
    policy = Gem(k=100, layer=7, min_prompt=0).resolve(spec)
    with pytest.raises(BadOption, match="65 tokens more are wanted, 1100 are planned"):
        evaluate_filter(loaded, policy, context=1090)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(BadOption, match="give a longer --text"):
        evaluate_filter(loaded, policy, context=800, text=short)

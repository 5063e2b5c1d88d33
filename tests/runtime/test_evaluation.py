"""Evaluation on the default model, small, and its wrong uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lowtide.models.errors import BadOption
from lowtide.runtime.evaluation.evaluate import evaluate
from lowtide.runtime.loading.load import Engine
from lowtide.runtime.planning.plan import LoadConfig, plan_reference

pytestmark = pytest.mark.once


def opened(path: Path, attention: str) -> Engine:
    options = LoadConfig(memory="8GiB", context=1100, attention=attention, compared_tokens=64)
    return Engine(plan_reference(path, options))


@pytest.fixture(scope="module")
def tidal(smollm2: Path) -> Iterator[Engine]:
    loaded = opened(smollm2, "tidal:k=300,layers=2+8+14+20")
    yield loaded
    loaded.close()


def test_a_policy_on_a_text_and_on_needles(tidal: Engine) -> None:
    said: list[str] = []
    found = evaluate(tidal, context=1000, windows=2, passkey_lengths=(500,), progress=said.append)
    values = found.to_dict()
    assert 0 < values["kl"] < 0.1
    assert values["top1_agreement"] > 0.8
    assert abs(values["nll_change"]) < 0.1
    assert values["tokens"] == 128 and [p["depth"] for p in values["places"]] == [750, 1000]
    assert 0.3 < values["keys_read"] < 0.6
    assert values["passkeys"]["asked"] == 3 == len(values["passkeys"]["cases"])
    assert values["passkeys"]["dense"] >= 2 and values["passkeys"]["found"] >= 2
    assert values["text"] == "Python's own language reference"
    assert len(said) == 5


def test_the_users_text_is_what_is_measured(tidal: Engine, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The tide comes in. " * 300)
    found = evaluate(tidal, context=800, text=text, windows=1, passkey_lengths=())
    assert found.passkeys == () and found.text == str(text)
    assert found.distance.dense_nll_sum / 64 < 0.1  # what repeats is foreseen


def test_wrong_use(tidal: Engine, smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="256 to 1035 tokens are wanted"):
        evaluate(tidal, context=1090)
    with pytest.raises(BadOption, match="256 to"):
        evaluate(tidal, context=10)
    with pytest.raises(BadOption, match="nowhere.txt cannot be read"):
        evaluate(tidal, context=800, text=tmp_path / "nowhere.txt")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(BadOption, match="has 3 tokens, 865 are wanted: give a longer --text"):
        evaluate(tidal, context=800, text=short)
    stock = opened(smollm2, "llama")
    with pytest.raises(BadOption, match="attention is llama.cpp's own"):
        evaluate(stock, context=800)
    stock.close()

"""How often drafts were right is counted and kept from one run to the next; a broken file counts nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from speculating import controller_of, perfect, speculate_with

from lowtide import FakeModel, Runtime
from lowtide.memory.plan.speculation.allocator import SpeculationChoice, SpeculationWorth
from lowtide.runtime.speculation.counts import (
    MAX_TOKENS,
    NUM_POSITIONS,
    AcceptanceCounts,
    add_to_file,
    file_name,
    prior_counts,
    read_counts,
)
from lowtide.runtime.speculation.worth import ASSUMED_TOKEN_COST, speculation_worth

REPLY = "The tide comes in, the tide goes out.\n"


def counted(num_tokens: int = 10) -> AcceptanceCounts:
    """Return counts of a draft that proposed before half of the tokens, and was right for two of three."""
    counts = AcceptanceCounts()
    counts.count_tokens((("ngram", 2),), num_tokens // 2)
    counts.count_tokens((), num_tokens - num_tokens // 2)
    counts.count("ngram", 2, 2, 1)
    counts.count_sibling("ngram", 2, is_right=True)
    return counts


def test_places_have_the_share_of_their_tokens_and_the_rates_of_their_class() -> None:
    (place,) = counted().situations(("ngram", "trigram"))
    assert place.share == 0.5
    rates = place.rates["ngram"]
    assert rates.acceptance[:2] == (1.0, 1.0) and rates.acceptance[2] < 1
    assert len(rates.acceptance) == NUM_POSITIONS and 0 < rates.siblings < 1
    assert counted().situations(("trigram",)) == ()


def test_counts_add_up_in_the_file_and_older_ones_fade() -> None:
    name = file_name("a model", "")
    assert read_counts(name).num_tokens == 0
    for _ in range(3):
        add_to_file(name, counted())
    assert read_counts(name).num_tokens == 30
    assert read_counts(name).situations(("ngram",))[0].share == 0.5
    add_to_file(name, counted(2 * MAX_TOKENS))
    assert read_counts(name).num_tokens == pytest.approx(MAX_TOKENS)
    assert file_name("a model", "a draft") != name != file_name("another", "")


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "[]",
        '{"tokens": 1, "rates": []}',
        '{"tokens": [{"proposed": [["ngram", 0]], "tokens": -1}], "rates": []}',
        '{"tokens": [], "rates": [{"draft": "ngram", "class": 0, "right": [1], "asked": [1], "siblings": [0, 0]}]}',
    ],
)
def test_a_broken_file_counts_nothing(tmp_path: Path, broken: str) -> None:
    name = file_name("a model", "")
    add_to_file(name, counted())
    (tmp_path / "calibrations" / name).write_text(broken)
    assert read_counts(name).num_tokens == 0
    add_to_file(name, counted())
    assert read_counts(name).num_tokens == 10


def test_the_file_holds_numbers_and_no_text(tmp_path: Path) -> None:
    with Runtime.open(FakeModel((REPLY,)), memory="8GiB", speculate="auto") as runtime:
        runtime.generate("tide tide tide tide\n", temperature=0, max_tokens=30)
    (path,) = (tmp_path / "calibrations").glob("acceptance-*.json")
    values = json.loads(path.read_text())
    assert {name for entry in values["rates"] for name in [entry["draft"]]} <= {"ngram", "trigram"}
    assert "tide" not in path.read_text()
    assert AcceptanceCounts.from_dict(values).num_tokens > 0


def test_accepted_tokens_are_counted_at_the_place_of_their_pass() -> None:
    model = FakeModel((REPLY,))
    controller = controller_of(perfect([ord(c) for c in REPLY]))
    with Runtime.open(model, memory="8GiB") as runtime:
        speculate_with(runtime, controller)
        stats = runtime.generate("x\n", temperature=0, max_tokens=30).stats.speculation
    assert stats is not None and stats["accepted"] > 20
    (place,) = controller.counts.situations(("scripted",))
    assert place.share > 0.9 and place.rates["scripted"].acceptance[0] == 1.0
    # The clock of this controller stands still: nothing can be compared.
    assert stats["measured_speedup"] is None and stats["promised_speedup"] is None


def test_own_conversations_outweigh_the_prior() -> None:
    spec = FakeModel().spec
    name, drafts = file_name(spec.fingerprint, ""), ("ngram", "trigram")

    def promised() -> float:
        worth = speculation_worth(spec, "key", "f16", drafts, None)
        assert pytest.approx(worth.costs.of(2) / worth.costs.of(1)) == 1 + ASSUMED_TOKEN_COST
        return worth.speed_up(SpeculationChoice(drafts=drafts, verify_batch=8))

    before = promised()
    never_right = AcceptanceCounts()
    never_right.count_tokens((), 10_000)
    add_to_file(name, never_right)
    assert 1 < promised() < 1 + 0.2 * (before - 1)
    always = AcceptanceCounts()
    always.count_tokens((("ngram", 5),), 20_000)
    for _ in range(100):
        always.count("ngram", 5, 7, 0)
    add_to_file(name, always)
    assert promised() > before


def test_the_prior_promises_something_and_names_only_drafts_that_exist() -> None:
    prior = prior_counts()
    names = {name for proposed in prior._tokens for name, _ in proposed}
    assert names == {"ngram", "trigram"} and prior.num_tokens > 1000
    spec = FakeModel().spec
    worth: SpeculationWorth = speculation_worth(spec, "key", "f16", ("ngram",), None)
    assert "74 prompts of 13 kinds" in worth.acceptance_source
    assert "assumed" in worth.costs_source


@pytest.mark.parametrize(("more_layers", "rate"), [(1, 0.6), (0, 0.85)])
def test_a_draft_model_has_an_assumed_rate_and_takes_its_share_of_a_pass(
    more_layers: int, rate: float
) -> None:
    spec = FakeModel().spec
    draft = dataclasses.replace(
        spec, num_layers=spec.num_layers + more_layers, weight_bytes=spec.weight_bytes // 4
    )
    worth = speculation_worth(spec, "key", "f16", ("model",), draft)
    (place,) = worth.situations
    assert place.share == 1 and place.rates["model"].acceptance[0] == pytest.approx(rate)
    share = draft.weight_bytes / max(spec.weight_bytes, 1)
    assert place.rates["model"].token_s == pytest.approx(share * worth.costs.of(1))
    assert "assumed" in worth.acceptance_source

"""Which candidate the search for the sparsest parameters takes, and when a passkey is lost."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lowtide.attention.calibration import NotCalibrated
from lowtide.attention.calibrator import CalibrationContext, Targets
from lowtide.attention.delta import calibrate
from lowtide.attention.delta.calibrate import HeadwiseSearch
from lowtide.attention.delta.head_params import HeadParams
from lowtide.attention.evaluation.compare import Distances
from lowtide.attention.evaluation.divergence import Distance
from lowtide.attention.evaluation.passkeys import make_passkey

CANDIDATES = [cast(HeadParams, SimpleNamespace(sparsity=share)) for share in (0.5, 0.4, 0.3)]
TARGETS = Targets(kl=0.1, key_loss=0.1)


def search(monkeypatch: pytest.MonkeyPatch, most: tuple[float, float]) -> HeadwiseSearch:
    """A search that loses a passkey above a sparsity: on the searched text, and on the other text."""

    class FakePositions:
        def __init__(self, seed: int) -> None:
            self.most = most[seed]

        @classmethod
        def of(cls, context: object, text: object, seed: int, *, is_thorough: bool) -> Any:
            assert is_thorough
            return cls(seed)

        def distances(self, policies: list[Any]) -> list[Distances]:
            return [
                Distances(text=Distance(num_tokens=1), keys_lost=int(policy.sparsity > self.most))
                for policy in policies
            ]

    monkeypatch.setattr(calibrate, "EvalPositions", FakePositions)
    model = SimpleNamespace(spec=SimpleNamespace(name="random"))
    context = CalibrationContext(
        model=cast(Any, model),
        hook=cast(Any, None),
        token_ids=[0] * 8,
        context=4,
        framing=str,
        text="a text",
    )
    return HeadwiseSearch(context, cast(Any, lambda params: params))


@pytest.mark.parametrize(
    ("most", "taken"), [((0.5, 0.5), 0.5), ((0.4, 0.5), 0.4), ((0.5, 0.3), 0.3)]
)
def test_a_sparsity_that_loses_a_passkey_is_not_taken(
    most: tuple[float, float], taken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, _ = search(monkeypatch, most).sparsest(CANDIDATES, TARGETS)
    assert params.sparsity == taken


def test_if_all_lose_a_passkey_there_is_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    searching = search(monkeypatch, (0.5, 0.1))
    with pytest.raises(NotCalibrated, match="no sparsity down to 30% .* with no passkey lost"):
        searching.sparsest(CANDIDATES, TARGETS)


@pytest.mark.parametrize(
    ("dense", "policy", "is_lost"), [(5, 4, True), (5, 5, False), (4, 3, False), (4, 5, False)]
)
def test_a_passkey_is_lost_if_dense_attention_predicts_it_and_the_policy_does_not(
    dense: int, policy: int, *, is_lost: bool
) -> None:
    assert Distance(num_tokens=5, num_dense_right=dense, num_right=policy).is_lost is is_lost


def test_every_doubled_passkey_has_two_equal_neighbours() -> None:
    keys = [make_passkey(seed, doubled=True) for seed in range(50)]
    assert all(len(key) == 5 and key.isdecimal() for key in keys)
    assert all(any(a == b for a, b in itertools.pairwise(key)) for key in keys)
    assert len(set(keys)) > 40 and keys == [make_passkey(seed, doubled=True) for seed in range(50)]

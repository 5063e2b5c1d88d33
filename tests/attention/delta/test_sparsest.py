"""Which policy the search for the sparsest one takes, of given distances, and what a lost key is."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest

from lowtide.attention.calibration import NotCalibrated
from lowtide.attention.delta import calibrate as sparsest
from lowtide.attention.delta.calibrate import Candidate, SparsestPolicy
from lowtide.attention.delta.tokens import Delta
from lowtide.attention.evaluation.compare import Distances
from lowtide.attention.evaluation.divergence import Distance
from lowtide.attention.evaluation.passkeys import make_passkey
from lowtide.attention.tidal.calibrate import Targets

CANDIDATES = [Candidate(Delta(sparsity=share), share) for share in (0.5, 0.4, 0.3)]
TARGETS = Targets(kl=0.1, key_loss=0.1)


class GivenPlaces:
    """Loses a key above a sparsity, on text that is searched on (seed 0) and on the other."""

    most = (0.5, 0.5)

    def __init__(self, *arguments: Any, is_thorough: bool) -> None:
        assert is_thorough
        self._seed = arguments[-1]

    def distances(self, policies: list[Delta]) -> list[Distances]:
        return [
            Distances(
                text=Distance(num_tokens=1),
                keys_lost=int(cast(float, policy.sparsity) > self.most[self._seed]),
            )
            for policy in policies
        ]


@pytest.mark.parametrize(
    ("most", "taken"), [((0.5, 0.5), 0.5), ((0.4, 0.5), 0.4), ((0.5, 0.3), 0.3)]
)
def test_a_sparsity_that_loses_a_key_is_not_taken(
    most: tuple[float, float], taken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate, _ = search(most, monkeypatch).found(CANDIDATES, TARGETS)
    assert candidate.sparsity == taken


def test_where_all_lose_one_there_is_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    model = type("Model", (), {"spec": type("Spec", (), {"name": "random"})})
    searching = search((0.5, 0.1), monkeypatch, model)
    with pytest.raises(NotCalibrated, match="no sparsity down to 30% .* with none of them lost"):
        searching.found(CANDIDATES, TARGETS)


def search(
    most: tuple[float, float], monkeypatch: pytest.MonkeyPatch, model: object = None
) -> SparsestPolicy:
    monkeypatch.setattr(
        sparsest, "EvalPositions", type("EvalPositions", (GivenPlaces,), {"most": most})
    )
    return SparsestPolicy(
        cast(Any, model), cast(Any, None), [0] * 8, 4, lambda text: text, lambda _: None
    )


@pytest.mark.parametrize(
    ("dense", "ours", "is_lost"), [(5, 4, True), (5, 5, False), (4, 3, False), (4, 5, False)]
)
def test_a_key_is_lost_where_dense_attention_says_it_and_the_policy_does_not(
    dense: int, ours: int, *, is_lost: bool
) -> None:
    assert Distance(num_tokens=5, num_dense_right=dense, num_right=ours).is_lost is is_lost


def test_every_doubled_key_has_two_neighbours_equal() -> None:
    keys = [make_passkey(seed, doubled=True) for seed in range(50)]
    assert all(len(key) == 5 and key.isdecimal() for key in keys)
    assert all(any(a == b for a, b in itertools.pairwise(key)) for key in keys)
    assert len(set(keys)) > 40 and keys == [make_passkey(seed, doubled=True) for seed in range(50)]

"""Evaluation: the one report of `lowtide evaluate`, with sections that depend on the kind of policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lowtide.attention.bindings.counts import ScoreCost
from lowtide.attention.evaluation.divergence import Distance
from lowtide.attention.evaluation.questions import HARD_KINDS, KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class PasskeyResult:
    """Whether dense attention and the policy found a passkey hidden at `depth` of `length` tokens."""

    length: int
    depth: float
    dense: bool
    found: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FilteredAnswer:
    """The result of a question of `kind` about sentences hidden at `depth` of `length` tokens.

    `retained` says whether the filter retained these sentences whole, `needed_k` how many tokens it must
    retain for that. `dense` says whether dense attention answers from the whole prompt, `found` whether it
    answers from the retained tokens.
    """

    kind: str
    length: int
    depth: float
    retained: bool
    needed_k: int
    dense: bool
    found: bool


@dataclass(frozen=True, slots=True)
class QuestionCounts:
    """Of `asked` questions: sentences `retained`, answered from the whole prompt (`dense`), and of these
    also answered from the retained tokens (`found`)."""

    asked: int
    retained: int
    dense: int
    found: int

    @classmethod
    def of(cls, answers: Sequence[FilteredAnswer]) -> QuestionCounts:
        """Count answers."""
        return cls(
            asked=len(answers),
            retained=sum(answer.retained for answer in answers),
            dense=sum(answer.dense for answer in answers),
            found=sum(answer.found for answer in answers if answer.dense),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterResult:
    """The section of a prompt filter: `answers`, and the likelihood of `num_tokens` continuing a text.

    `dense_nll` is the negative log likelihood in nats/token after the whole text under dense attention,
    `nll` that after the retained tokens.
    """

    answers: tuple[FilteredAnswer, ...]
    num_tokens: int
    dense_nll: float
    nll: float

    @property
    def nll_change(self) -> float:
        """The relative change of the negative log likelihood; above 0 the text became less likely."""
        return self.nll / self.dense_nll - 1

    def of_kinds(self, kinds: Sequence[str]) -> list[FilteredAnswer]:
        """Return the answers to questions of some kinds."""
        return [answer for answer in self.answers if answer.kind in kinds]

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON values."""
        return {
            "tokens": self.num_tokens,
            "dense_nll": self.dense_nll,
            "nll": self.nll,
            "nll_change": self.nll_change,
            "questions": _question_values(self.of_kinds(KINDS)),
            "hard_questions": _question_values(self.of_kinds(HARD_KINDS)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A policy compared with dense attention.

    A policy that approximates attention has `distances` (by depth in tokens), `passkeys`, `keys_read` (the
    share of the cached keys that a decoded token attends to) and, if it reports them, `scores`. A policy that
    filters prompts has `filtered` instead.
    """

    attention: str
    context: int
    text: str
    distances: tuple[tuple[int, Distance], ...] = ()
    passkeys: tuple[PasskeyResult, ...] = ()
    keys_read: float = 1.0
    scores: ScoreCost | None = None
    filtered: FilterResult | None = None

    @property
    def distance(self) -> Distance:
        """The distance over all positions."""
        return sum((distance for _, distance in self.distances), Distance())

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON values."""
        values: dict[str, Any] = {
            "attention": self.attention,
            "context": self.context,
            "text": self.text,
        }
        if self.filtered is not None:
            return values | self.filtered.to_dict()
        return values | {
            "tokens": self.distance.num_tokens,
            **_distance_values(self.distance),
            "keys_read": self.keys_read,
            "scores": self.scores.to_dict() if self.scores else None,
            "places": [
                {"depth": depth, **_distance_values(found)} for depth, found in self.distances
            ],
            "passkeys": {
                "asked": len(self.passkeys),
                "dense": sum(passkey.dense for passkey in self.passkeys),
                "found": sum(passkey.found for passkey in self.passkeys),
                "cases": [asdict(passkey) for passkey in self.passkeys],
            },
        }


def _distance_values(distance: Distance) -> dict[str, float]:
    return {
        "kl": distance.kl,
        "nll_change": distance.nll_change,
        "top1_agreement": distance.top1_agreement,
    }


def _question_values(answers: Sequence[FilteredAnswer]) -> dict[str, Any]:
    counts = asdict(QuestionCounts.of(answers))
    return {**counts, "cases": [asdict(answer) for answer in answers]}

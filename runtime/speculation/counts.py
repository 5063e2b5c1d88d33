"""AcceptanceCounts: how often drafts were right on a user's conversations, kept from one run to the next.

They hold no text: only how many tokens lay at places where drafts proposed with some confidence, and how many of the
proposed tokens were right, by position. A prior stands in for conversations that are not known yet. It was counted in
the same way, on prompts of 13 kinds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lowtide.attention.calibration import CalibrationError, find_file, write_values
from lowtide.memory.plan.speculation.allocator import DraftRates, Situation

Proposed = tuple[tuple[str, int], ...]
"""The drafts that proposed at a place, each with its class of confidence, in order of their names."""

NUM_POSITIONS = 8
"""Positions that are told apart; the last one stands for all later ones."""
PRIOR_TOKENS = 100
"""Tokens that the prior counts for: a few answers of the user's outweigh it."""
MAX_TOKENS = 20_000
"""Tokens that are remembered: beyond them, older ones count less and less."""
MIN_SHARE = 1e-4
"""Places with a smaller share of the tokens are left out of the arithmetic."""
PRIOR = Path(__file__).with_name("prior.json")
PRIOR_NAME = "a prior, counted with SmolLM2-135M on 74 prompts of 13 kinds"


class _Rates:
    """Right and asked tokens of one class, by position, and those of siblings."""

    def __init__(self) -> None:
        self.right = [0.0] * NUM_POSITIONS
        self.asked = [0.0] * NUM_POSITIONS
        self.siblings = [0.0, 0.0]

    def add(self, other: _Rates, weight: float) -> None:
        for position in range(NUM_POSITIONS):
            self.right[position] += weight * other.right[position]
            self.asked[position] += weight * other.asked[position]
        self.siblings = [
            mine + weight * theirs
            for mine, theirs in zip(self.siblings, other.siblings, strict=True)
        ]

    def rates(self, token_s: float) -> DraftRates | None:
        """Return the rates; a position that was asked for less than the one before follows it. None for no count."""
        expected, acceptance = 0.0, list[float]()
        for right, asked in zip(self.right, self.asked, strict=True):
            if not acceptance and asked <= 0:
                return None
            # A few tokens at the rate of the position before: late positions are rarely reached.
            expected = (right + 2 * expected) / (asked + 2) if acceptance else right / asked
            acceptance.append(min(expected, 1.0))
        right, asked = self.siblings
        return DraftRates(
            acceptance=tuple(acceptance), siblings=right / (asked + 2), token_s=token_s
        )


class AcceptanceCounts:
    """Tokens by place, and rates by draft and class of confidence."""

    def __init__(self) -> None:
        self._tokens = Counter[Proposed]()
        self._rates: dict[tuple[str, int], _Rates] = defaultdict(_Rates)

    @property
    def num_tokens(self) -> float:
        """How many tokens were counted."""
        return sum(self._tokens.values())

    def count_tokens(self, proposed: Proposed, num_tokens: int) -> None:
        """Count the tokens of a pass before which these drafts proposed something."""
        self._tokens[proposed] += num_tokens

    def count(self, draft: str, confidence: int, num_right: int, num_wrong: int) -> None:
        """Count a proposal whose first `num_right` tokens were right and whose next `num_wrong` (0 or 1) not."""
        rates = self._rates[draft, confidence]
        for position in range(num_right + num_wrong):
            at = min(position, NUM_POSITIONS - 1)
            rates.asked[at] += 1
            rates.right[at] += position < num_right

    def count_sibling(self, draft: str, confidence: int, *, is_right: bool) -> None:
        """Count the siblings of a token that was wrong: whether one of them was right."""
        rates = self._rates[draft, confidence]
        rates.siblings[0] += is_right
        rates.siblings[1] += 1

    def add(self, other: AcceptanceCounts, weight: float = 1.0) -> None:
        """Add the counts of others, each as often as `weight` says."""
        for proposed, number in other._tokens.items():
            self._tokens[proposed] += weight * number  # type: ignore[assignment]
        for key, rates in other._rates.items():
            self._rates[key].add(rates, weight)

    def scaled_to(self, num_tokens: float) -> AcceptanceCounts:
        """Return the same counts as if so many tokens had been counted."""
        scaled = AcceptanceCounts()
        scaled.add(self, num_tokens / max(self.num_tokens, 1e-9))
        return scaled

    def rates_of(self, draft: str, confidence: int) -> DraftRates | None:
        """Return the rates of a draft's class; None where it was never counted."""
        rates = self._rates.get((draft, confidence))
        return rates.rates(0.0) if rates is not None else None

    def situations(self, drafts: Iterable[str], token_s: float = 0.0) -> tuple[Situation, ...]:
        """Return the places in texts as the allocator sees them, with these drafts only."""
        names, shares = set(drafts), Counter[Proposed]()
        total = max(self.num_tokens, 1e-9)
        for proposed, number in self._tokens.items():
            known = tuple(one for one in proposed if one[0] in names)
            shares[known] += number / total  # type: ignore[assignment]
        found = []
        for known, share in shares.items():
            rates = {key[0]: self._rates[key].rates(token_s) for key in known if key in self._rates}
            known_rates = {name: one for name, one in rates.items() if one is not None}
            if known_rates and share >= MIN_SHARE:
                found.append(Situation(share=float(share), rates=known_rates))
        return tuple(found)

    @classmethod
    def of_rate(cls, draft: str, rate: float) -> AcceptanceCounts:
        """Return the counts of a draft that always proposes and is right at this rate, at every position."""
        counts = cls()
        counts._tokens[((draft, 0),)] = 1
        rates = counts._rates[draft, 0]
        rates.asked, rates.right = [100.0] * NUM_POSITIONS, [100 * rate] * NUM_POSITIONS
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "tokens": [
                {"proposed": [list(one) for one in proposed], "tokens": number}
                for proposed, number in self._tokens.items()
            ],
            "rates": [
                {
                    "draft": draft,
                    "class": confidence,
                    "right": rates.right,
                    "asked": rates.asked,
                    "siblings": rates.siblings,
                }
                for (draft, confidence), rates in self._rates.items()
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AcceptanceCounts:
        """Read what `to_dict` wrote; raise `ValueError`, `TypeError` or `LookupError` for anything else."""
        counts = cls()
        for entry in values["tokens"]:
            proposed = tuple((str(name), int(confidence)) for name, confidence in entry["proposed"])
            counts._tokens[proposed] += _number(entry["tokens"])  # type: ignore[assignment]
        for entry in values["rates"]:
            rates = counts._rates[str(entry["draft"]), int(entry["class"])]
            rates.right = [_number(one) for one in entry["right"]]
            rates.asked = [_number(one) for one in entry["asked"]]
            rates.siblings = [_number(one) for one in entry["siblings"]]
            if (len(rates.right), len(rates.asked), len(rates.siblings)) != (
                NUM_POSITIONS,
                NUM_POSITIONS,
                2,
            ):
                raise ValueError("a class has another number of positions")
        return counts


def _number(value: Any) -> float:
    number = float(value)
    if not 0 <= number < 1e12:
        raise ValueError(f"{value!r} is no count")
    return number


@cache
def prior_counts() -> AcceptanceCounts:
    """Return the counts that stand in for a user's own."""
    return AcceptanceCounts.from_dict(json.loads(PRIOR.read_text(encoding="utf-8")))


def file_name(fingerprint: str, draft_model: str) -> str:
    """Return the name of the file with a user's counts for a model and, where there is one, its draft model."""
    digest = hashlib.sha256(f"{fingerprint} {draft_model}".encode()).hexdigest()
    return f"acceptance-{digest[:16]}.json"


def read_counts(name: str) -> AcceptanceCounts:
    """Return the user's counts; empty ones where there is no file, or one that cannot be read."""
    path = find_file(name)
    if path is not None:
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            return AcceptanceCounts.from_dict(json.loads(path.read_text(encoding="utf-8")))
    return AcceptanceCounts()


def add_to_file(name: str, counts: AcceptanceCounts) -> None:
    """Add counts to the user's file, where it can be written."""
    if not counts.num_tokens:
        return
    total = AcceptanceCounts()
    total.add(read_counts(name))
    total.add(counts)
    if total.num_tokens > MAX_TOKENS:
        total = total.scaled_to(MAX_TOKENS)
    with contextlib.suppress(CalibrationError):  # the folder may not be writable
        write_values(name, total.to_dict())

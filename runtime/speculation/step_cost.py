"""What a forward pass costs by its number of tokens, measured on this machine when a model is loaded.

The measurement also tells whether a token's logits depend on the other tokens of its pass. It is stored in the
folder of the calibrations and read again by later runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowtide.attention.calibration import CalibrationError, find_file, write_values
from lowtide.memory.plan.speculation.allocator import CostCurve

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D

ENOUGH_S = 0.15
"""No further round of measurements starts after this many seconds."""
MAX_ROUNDS = 3
FOLLOW_RATE = 0.1
"""How far the curve moves towards each measured pass."""
RETURN_RATE = 0.005
"""How far it moves back to the first measurement with each plain pass: one slow pass is forgiven."""
RETURN_EVERY = 16
"""Plain passes after which it moves back, by the rate of all of them."""
MAX_SURPRISE = 2.0
"""A pass that took more than this multiple of the expected time was disturbed, and counts as this multiple."""


class SteppedModel(Protocol):
    """A sequence to which tokens are appended and removed again, as `Model` has them."""

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens and return the last one's logits, shape (vocabulary,)."""
        ...

    def forward_rows(self, token_ids: Sequence[int]) -> Logits2D:
        """Append the tokens and return the logits of each, shape (tokens, vocabulary)."""
        ...

    def truncate(self, num_tokens: int) -> int | None:
        """Remove the tokens from position `num_tokens` on."""
        ...


@dataclass(frozen=True, slots=True)
class StepBenchmark:
    """`costs` of a pass by its tokens; `rows_agree` if a token's logits have the same bits alone and in a pass.

    That is tested with an empty cache: it says nothing of attention over many keys.
    """

    costs: CostCurve
    rows_agree: bool


def benchmark_steps(model: SteppedModel, max_tokens: int, key: str) -> StepBenchmark:
    """Measure passes of 1 to `max_tokens` tokens; `key` names the model, the machine and the settings.

    The model's cache is empty before and after. What is stored for the same key is not measured again.
    """
    name = _file_name(key)
    costs, rows_agree = _read(find_file(name))
    is_new = costs is None or costs.num_rows[-1] < max_tokens or max_tokens not in rows_agree
    if costs is None or costs.num_rows[-1] < max_tokens:
        rows = _measured_rows(max_tokens)
        costs = CostCurve(num_rows=rows, seconds=tuple(_measure(model, rows)))
    if max_tokens not in rows_agree:
        rows_agree = {**rows_agree, max_tokens: _rows_agree(model, max_tokens)}
    if is_new:
        values = {
            "of": key,
            "num_rows": costs.num_rows,
            "seconds": costs.seconds,
            "rows_agree": rows_agree,
        }
        with contextlib.suppress(CalibrationError):  # the folder may not be writable
            write_values(name, values)
    return StepBenchmark(_up_to(costs, max_tokens), rows_agree[max_tokens])


def _up_to(costs: CostCurve, max_tokens: int) -> CostCurve:
    rows = sorted({*(n for n in costs.num_rows if n < max_tokens), max_tokens})
    return CostCurve(num_rows=tuple(rows), seconds=tuple(costs.of(n) for n in rows))


def stored_costs(key: str) -> CostCurve | None:
    """Return the cost of passes if it was measured for this key."""
    return _read(find_file(_file_name(key)))[0]


def _file_name(key: str) -> str:
    return f"pass-costs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _measured_rows(max_tokens: int) -> tuple[int, ...]:
    return tuple(sorted({1, max_tokens, *(n for n in (2, 4, 8, 16, 32) if n < max_tokens)}))


def _measure(model: SteppedModel, rows: tuple[int, ...]) -> list[float]:
    """Return the shortest of a few rounds: whatever else the machine does only adds time."""
    best = [float("inf")] * len(rows)
    model.truncate(0)
    model.forward_rows((0,))
    started = time.perf_counter()
    for _ in range(MAX_ROUNDS):
        for i, num_rows in enumerate(rows):
            model.truncate(1)
            before = time.perf_counter()
            model.forward_rows((0,) * num_rows)
            best[i] = min(best[i], time.perf_counter() - before)
        if time.perf_counter() - started > ENOUGH_S:
            break
    model.truncate(0)
    return best


def _rows_agree(model: SteppedModel, num_rows: int) -> bool:
    """Compare the logits of each token of a pass with those of the token alone, by digest to save memory."""
    token_ids = [row * 7 % 251 for row in range(num_rows)]
    together = [_digest(row) for row in model.forward_rows(token_ids)]
    model.truncate(0)
    agree = all(
        _digest(model.forward((token_id,))) == digest
        for token_id, digest in zip(token_ids, together, strict=True)
    )
    model.truncate(0)
    return agree


def _digest(row: Logits) -> bytes:
    return hashlib.blake2b(row.data, digest_size=16).digest()


def _read(path: Path | None) -> tuple[CostCurve | None, dict[int, bool]]:
    """Return the stored costs, and for which passes rows agree; None where there is no file or an invalid one."""
    if path is None:
        return None, {}
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        seconds = tuple(float(value) for value in values["seconds"])
        rows = tuple(int(value) for value in values["num_rows"])
        agree = {int(number): value is True for number, value in values["rows_agree"].items()}
        ascending = rows[0] == 1 and all(one < other for one, other in pairwise(rows))
        are_times = len(seconds) == len(rows) and all(0 < one < 1e9 for one in seconds)
        if not ascending or not are_times:
            return None, {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None, {}
    return CostCurve(num_rows=rows, seconds=seconds), agree


class StepCostModel:
    """The measured curve, adjusted by every pass: passes slow down as the cache fills or the machine does.

    `clock` returns the time in seconds.
    """

    def __init__(self, measured: CostCurve, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        most = measured.num_rows[-1]
        one_s = max(measured.of(1), 1e-9)
        self._measured = [measured.of(rows) / one_s for rows in range(most + 1)]
        self._ratios = self._measured[:]
        self._one_s = one_s
        self._num_plain = 0

    @property
    def max_tokens(self) -> int:
        """The most tokens of a pass that were measured."""
        return len(self._ratios) - 1

    @property
    def curve(self) -> CostCurve:
        """The seconds of passes as they are expected now."""
        rows = tuple(range(1, len(self._ratios)))
        return CostCurve(num_rows=rows, seconds=tuple(map(self.of, rows)))

    def of(self, num_tokens: int) -> float:
        """Return the seconds of a pass of `num_tokens` tokens."""
        return self._one_s * self._ratios[num_tokens]

    def observe(self, num_tokens: int, seconds: float, plain_rows: int = 1) -> None:
        """Adjust the curve to a pass that took `seconds`; one of `plain_rows` tokens had no drafts.

        Passes without drafts set the time of one token, others the ratios to it.
        """
        surprise = seconds / max(self.of(num_tokens), 1e-9)
        surprise = min(max(surprise, 1 / MAX_SURPRISE), MAX_SURPRISE)
        if num_tokens == plain_rows:
            # The first passes count for more: the stored measurement may be from another day.
            self._num_plain += 1
            self._one_s *= surprise ** max(FOLLOW_RATE, 1 / (1 + self._num_plain))
            if self._num_plain % RETURN_EVERY == 0:
                for rows in range(2, len(self._ratios)):
                    back = self._measured[rows] / self._ratios[rows]
                    self._ratios[rows] *= back ** (RETURN_RATE * RETURN_EVERY)
        else:
            for rows in range(2, len(self._ratios)):
                self._ratios[rows] *= surprise ** (FOLLOW_RATE / (1 + abs(rows - num_tokens)))

"""What a pass costs by its rows, and whether rows depend on each other: measured on this machine when a
model is opened, and kept in a file.

Knows no draft.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowtide.attention.calibration import CalibrationError, find_file, write_values
from lowtide.memory.plan.speculation import CostCurve

if TYPE_CHECKING:
    from lowtide.models.model import Logits, Logits2D

ENOUGH_S = 0.15
"""Time after which no further round of measurements is begun."""
MOST_ROUNDS = 3
FOLLOWING = 0.1
"""How far the curve moves to each pass that it is held against."""
RETURNING = 0.005
"""How far it moves back to what was measured at first with each plain step: one slow pass is forgiven."""
MOST_SURPRISE = 2.0
"""A pass that took longer than this many times what was expected was disturbed, and counts as so many."""


class Passes(Protocol):
    """A sequence that rows are appended to and taken off again, as `Model` has it."""

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Append the tokens and return the logits of the last row."""
        ...

    def forward_rows(self, token_ids: Sequence[int]) -> Logits2D:
        """Append the tokens and return the logits of every row."""
        ...

    def truncate(self, num_tokens: int) -> int | None:
        """Forget every token from position `num_tokens` on."""
        ...


@dataclass(frozen=True, slots=True)
class StepBenchmark:
    """`costs` by rows; `rows_agree` where a row of a large pass had the very bits that it has alone.

    That is seen at an empty cache: of attention over many keys it says nothing.
    """

    costs: CostCurve
    rows_agree: bool


def benchmark_steps(model: Passes, num_rows: int, key: str) -> StepBenchmark:
    """Return what passes of 1 to `num_rows` rows are like; `key` says of which model, machine and setting.

    The model's cache is empty before and after. What was measured under the key is not measured again.
    """
    rows = _measured_rows(num_rows)
    name = f"pass-costs-{hashlib.sha256(f'{key} {rows}'.encode()).hexdigest()[:16]}.json"
    known = _read(find_file(name), rows)
    if known is not None:
        return known
    curve = CostCurve(num_rows=rows, seconds=tuple(_measured(model, rows)))
    found = StepBenchmark(curve, _rows_agree(model, num_rows))
    values = {"of": key, "num_rows": rows, "seconds": curve.seconds, "rows_agree": found.rows_agree}
    with contextlib.suppress(CalibrationError):  # in a folder that cannot be written it is not kept
        write_values(name, values)
    return found


def _measured_rows(num_rows: int) -> tuple[int, ...]:
    return tuple(sorted({1, num_rows, *(n for n in (2, 4, 8, 16, 32) if n < num_rows)}))


def _measured(model: Passes, rows: tuple[int, ...]) -> list[float]:
    """The least of a few rounds: whatever else the machine did only adds."""
    best = [float("inf")] * len(rows)
    model.truncate(0)
    model.forward_rows((0,))
    started = time.perf_counter()
    for _ in range(MOST_ROUNDS):
        for i, num_rows in enumerate(rows):
            model.truncate(1)
            before = time.perf_counter()
            model.forward_rows((0,) * num_rows)
            best[i] = min(best[i], time.perf_counter() - before)
        if time.perf_counter() - started > ENOUGH_S:
            break
    model.truncate(0)
    return best


def _rows_agree(model: Passes, num_rows: int) -> bool:
    """Compare each row of a pass with the same row computed alone; rows are as long as a vocabulary."""
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


def _read(path: Path | None, rows: tuple[int, ...]) -> StepBenchmark | None:
    """What another run measured; anything odd is measured again."""
    if path is None:
        return None
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        seconds = tuple(float(value) for value in values["seconds"])
        rows_agree = values["rows_agree"] is True
        if tuple(values["num_rows"]) != rows or len(seconds) != len(rows) or min(seconds) <= 0:
            return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return StepBenchmark(CostCurve(num_rows=rows, seconds=seconds), rows_agree)


class StepCostModel:
    """The curve as it is now: passes get slower as the cache fills, and machines change their pace."""

    def __init__(self, measured: CostCurve, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        most = measured.num_rows[-1]
        one_s = max(measured.of(1), 1e-9)
        self._measured = [measured.of(rows) / one_s for rows in range(most + 1)]
        self._ratios = self._measured[:]
        self._one_s = one_s
        self._num_plain = 0

    @property
    def most_rows(self) -> int:
        """The most rows that were measured."""
        return len(self._ratios) - 1

    def of(self, num_rows: int) -> float:
        """Return the seconds that a pass of so many rows takes."""
        return self._one_s * self._ratios[num_rows]

    def observe(self, num_rows: int, seconds: float, plain_rows: int = 1) -> None:
        """Hold the curve against a pass; one of `plain_rows` verified nothing: it tells the pace."""
        surprise = seconds / max(self.of(num_rows), 1e-9)
        surprise = min(max(surprise, 1 / MOST_SURPRISE), MOST_SURPRISE)
        if num_rows == plain_rows:
            # What was measured is of another day, maybe: the first steps count for more.
            self._num_plain += 1
            self._one_s *= surprise ** max(FOLLOWING, 1 / (1 + self._num_plain))
            for rows in range(2, len(self._ratios)):
                back = self._measured[rows] / self._ratios[rows]
                self._ratios[rows] *= back**RETURNING
        else:
            for rows in range(2, len(self._ratios)):
                self._ratios[rows] *= surprise ** (FOLLOWING / (1 + abs(rows - num_rows)))

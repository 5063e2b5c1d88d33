"""What the user may ask of a generation, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lowtide.models.errors import BadOption

OVERFLOWS = ("error", "drop-oldest")
MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off, as is `repeat_penalty` 1,
    which looks back over `repeat_last_n` tokens. `max_tokens` None goes on until the model ends or the
    context is full. `stop` texts end the answer and are not part of it. `overflow` says what happens
    to a prompt beyond the context: "error", or "drop-oldest". `seed` None draws one, reported in the
    statistics. `explain` has the last piece tell what a filter (`Gem`) kept of the prompt.
    """

    max_tokens: int | None = 512
    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    stop: tuple[str, ...] = ()
    overflow: str = "error"
    explain: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _texts(self.stop))
        self._check_ranges()
        if not all(isinstance(text, str) and text for text in self.stop):
            raise BadOption(f"stop is {self.stop!r}, texts of at least one character are wanted")
        if self.overflow not in OVERFLOWS:
            raise BadOption(
                f"overflow is {self.overflow!r}, one of {', '.join(OVERFLOWS)} is wanted"
            )

    def _check_ranges(self) -> None:
        for name, least, most in (
            ("max_tokens", 1, math.inf),
            ("temperature", 0, 100),
            ("top_k", 0, math.inf),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repeat_penalty", 0.01, 100),
            ("repeat_last_n", 0, math.inf),
            ("seed", 0, MAX_SEED),
        ):
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "seed"):
                continue
            whole = name in ("max_tokens", "top_k", "repeat_last_n", "seed")
            kind: Any = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise BadOption(f"{name} is {value!r}, a number is wanted")
            if not least <= value <= most:
                raise BadOption(f"{name} is {value}, {_range(least, most)} is wanted")

    @classmethod
    def of(cls, base: SamplingParams | None = None, **values: Any) -> SamplingParams:
        """Return `base`, or the defaults, with these values; a name that is none is a `BadOption`."""
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise BadOption(f"{unknown[0]!r} is no option of a generation: use {', '.join(names)}")
        return dataclasses.replace(base or cls(), **values)


def _texts(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _range(least: float, most: float) -> str:
    return f"{least} or more" if most == math.inf else f"{least} to {most}"

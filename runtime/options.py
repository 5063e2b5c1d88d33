"""SamplingParams: how to choose tokens and when to stop, checked when it is made."""

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
    """How to choose tokens and when to stop. Raises `BadOption` for a value out of range."""

    max_tokens: int | None = 512
    """Most tokens to generate; None goes on until the model ends the text or the context is full."""
    temperature: float = 0.7
    """Divides the logits; 0 is greedy (the most probable token)."""
    top_k: int = 40
    """Samples from the k most probable tokens; 0 is off."""
    top_p: float = 0.95
    """Samples from the most probable tokens that reach this probability together; 1 is off."""
    min_p: float = 0.05
    """Drops tokens below this share of the most probable one's probability; 0 is off."""
    repeat_penalty: float = 1.0
    """Makes tokens that occurred before less probable; 1 is off."""
    repeat_last_n: int = 64
    """Tokens that the penalty looks back on."""
    seed: int | None = None
    """Seed of the random draws; None draws one, which the statistics report."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it; a single text is accepted, too."""
    overflow: str = "error"
    """What happens to a prompt that exceeds the context: "error", or "drop-oldest"."""
    explain: bool = False
    """Whether the last chunk lists the spans of the prompt that `Gem` retained."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _texts(self.stop))
        self._check_ranges()
        if not all(isinstance(text, str) and text for text in self.stop):
            raise BadOption(
                f"stop is {self.stop!r}; each stop text must have at least one character"
            )
        if self.overflow not in OVERFLOWS:
            raise BadOption(f"overflow is {self.overflow!r}; it must be {' or '.join(OVERFLOWS)}")

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
            is_whole = name in ("max_tokens", "top_k", "repeat_last_n", "seed")
            kind: Any = int if is_whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise BadOption(
                    f"{name} is {value!r}; it must be a {'whole ' if is_whole else ''}number"
                )
            if not least <= value <= most:
                raise BadOption(f"{name} is {value}; it must be {_range(least, most)}")

    @classmethod
    def of(cls, base: SamplingParams | None = None, **values: Any) -> SamplingParams:
        """Return `base`, or the defaults, with `values`; raises `BadOption` for an unknown name."""
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise BadOption(
                f"unknown sampling parameter {unknown[0]!r}; the parameters are {', '.join(names)}"
            )
        return dataclasses.replace(base or cls(), **values)


def _texts(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _range(least: float, most: float) -> str:
    return f"at least {least}" if most == math.inf else f"between {least} and {most}"

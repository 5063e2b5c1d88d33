"""SamplingParams: how to choose tokens and when to stop, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import (
    as_whole,
    choice,
    flag,
    number,
    shown,
    texts,
    whole_number,
)
from lowtide.models.errors import BadOption

OVERFLOWS = ("error", "drop-oldest")
SAMPLINGS = ("masked", "asap", "awrs")
MAX_SEED = (1 << 63) - 1
MAX_BIAS = 100
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises `BadOption` for a value out of range.

    A number may be of any type that converts to the field's without loss, such as numpy's.
    """

    max_tokens: int | None = 512
    """Most tokens to generate; None or -1 goes on until the model ends the text or the context is full."""
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
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that this answer has it, -2 to 2; 0 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens that this answer has, -2 to 2; 0 is off."""
    logit_bias: Any = ()
    """What is added to the logits of tokens: a dict from token ids to -100 (never) up to 100; pairs once checked."""
    logprobs: int | None = None
    """Whether each token comes with its log probability, and with how many of the most probable at its place (0 to
    20); None is off. They are the model's: nothing here changes them."""
    seed: int | None = None
    """Seed of the random draws; None or -1 draws one, which the statistics report."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it; a single text, a list, or None for none, too."""
    overflow: str = "error"
    """What happens to a prompt that exceeds the context: "error", or "drop-oldest"."""
    special: bool = False
    """Whether control tokens that a raw prompt spells become tokens; in a chat, only the template's do."""
    explain: bool = False
    """Whether the last chunk lists the spans of the prompt that `Gem` retained."""
    constraint: Any = None
    """What the answer must look like: `JsonSchema`, `JsonObject`, `Regex`, `Grammar`, `Choice`, a dict with a JSON
    schema, a dataclass, a pydantic model, or a `Constraint` of your own. Callers may name it `response_format`."""

    sampling: str = "masked"
    """How tokens are drawn under a constraint. "masked": from the legal ones. "asap": the same, weighted by what
    earlier answers of the same prompt and constraint showed of their futures. "awrs": by rejection, with a weight;
    answers of a batch with one prompt are particles. The latter two draw from the whole distribution at the
    temperature: top-k, top-p and min-p are off."""

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)

    def _checked(self) -> dict[str, Any]:
        """Return every field's value as the type that it has here; raise `BadOption` for a wrong one."""
        checked: dict[str, Any] = {}
        for name, least, most in _WHOLE:
            value = getattr(self, name)
            is_none = name in _NONE_OR_MINUS_ONE and (value is None or _is_minus_one(value))
            checked[name] = (
                None
                if is_none
                else whole_number(option(name), value, least, most, _ALSO.get(name, ""))
            )
        for name, lowest, highest in _REAL:
            checked[name] = number(option(name), getattr(self, name), lowest, highest)
        checked["logit_bias"] = _biases(self.logit_bias)
        if self.logprobs is not None:
            checked["logprobs"] = whole_number(
                option("logprobs"), self.logprobs, 0, MAX_TOP_LOGPROBS
            )
        checked["stop"] = texts(option("stop"), self.stop)
        checked["overflow"] = choice(option("overflow"), self.overflow, OVERFLOWS)
        checked["sampling"] = choice(option("sampling"), self.sampling, SAMPLINGS)
        if self.sampling != "masked" and checked["temperature"] == 0:
            raise BadOption(
                f"{option('sampling', self.sampling)} draws at random, and {option('temperature')} is 0: raise it, or "
                "leave one of them out"
            )
        checked["special"] = flag(option("special"), self.special)
        checked["explain"] = flag(option("explain"), self.explain)
        if self.constraint is not None:
            checked["constraint"] = self._format(checked["stop"])
        return checked

    def _format(self, stop: tuple[str, ...]) -> Any:
        from lowtide.runtime.structured.response_format import as_format

        try:
            found = as_format(self.constraint)
        except BadOption as error:
            raise BadOption(f"the constraint is not valid: {error}") from None
        if stop and found is not None and found.says_end:
            raise BadOption(
                f"{option('stop')} is set, but the constraint says where the answer ends: leave one of them out"
            )
        return found

    @property
    def draws_seed(self) -> bool:
        """Whether an answer depends on a seed that nobody chose."""
        return self.seed is None and self.temperature > 0

    @classmethod
    def of(
        cls, base: SamplingParams | Mapping[str, Any] | None = None, **values: Any
    ) -> SamplingParams:
        """Return `base`, or the defaults, with `values`; raises `BadOption` for an unknown name.

        `base` may be a dict with fields by name. `response_format` is another name of `constraint`.
        """
        if isinstance(base, Mapping):
            base = cls.of(None, **{str(name): value for name, value in base.items()})
        if base is not None and not isinstance(base, cls):
            raise BadOption(f"params is {shown(base)}; it must be a SamplingParams or a dict")
        if "response_format" in values:
            if values.get("constraint") is not None:
                raise BadOption("constraint and response_format say the same: name one of them")
            values["constraint"] = values.pop("response_format")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise BadOption(
                f"unknown sampling parameter {unknown[0]!r}; the parameters are {', '.join(names)}"
            )
        return dataclasses.replace(base or cls(), **values)


_WHOLE = (
    ("max_tokens", 1, math.inf),
    ("top_k", 0, math.inf),
    ("repeat_last_n", 0, math.inf),
    ("seed", 0, MAX_SEED),
)
_REAL = (
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("repeat_penalty", 0.01, 100),
    ("frequency_penalty", -2, 2),
    ("presence_penalty", -2, 2),
)
_NONE_OR_MINUS_ONE = ("max_tokens", "seed")
_ALSO = {
    "max_tokens": ", or -1 to go on until the model ends the text or the context is full",
    "seed": ", or -1 to draw one",
}


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """Return the biases as pairs of a token id and a number, by id; None is none."""
    name = option("logit_bias")
    try:
        pairs = [
            (token_id, bias)
            for token_id, bias in (value.items() if isinstance(value, Mapping) else value or ())
        ]
    except Exception:  # a caller's own object may raise anything
        raise BadOption(
            f"{name} is {shown(value)}; it must be a dict from token ids to numbers"
        ) from None
    checked = {
        whole_number(f"a token of {name}", token_id): number(
            f"{name} of token {shown(token_id)}", bias, -MAX_BIAS, MAX_BIAS
        )
        for token_id, bias in pairs
    }
    return tuple(sorted(checked.items()))


def _is_minus_one(value: Any) -> bool:
    return as_whole(value) == -1

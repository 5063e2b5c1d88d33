"""Small models whose headers state absurd things, drawn at random, and budgets to open them with."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_files import write_model

from lowtide.memory.units import MIB

CONTEXTS = (
    1,
    2,
    255,
    257,
    511,
    1000,
    8191,
    131_072,
    1_000_000,
    10_485_760,
    (1 << 31) - 1,
    (1 << 32) - 1,
)
"""Trained contexts; 0 is added by `drawn`."""
UNITS = ("{{ m }}", "{{()}}", "{% if a %}b{% endif %}", "text ", "{{ 'a' ~ b ~ c ~ d }}")
"""What a long chat template repeats."""


@dataclass(frozen=True)
class AbsurdModel:
    """A model, by the arguments of `write_model`, and a command under a budget."""

    model: dict[str, Any]
    budget_bytes: int
    command: str
    options: list[str] = field(default_factory=list)

    @classmethod
    def drawn(cls, numbers: random.Random) -> AbsurdModel:
        """Draw one: mostly ordinary, with one to three extremes."""
        model: dict[str, Any] = {"context": numbers.choice(CONTEXTS)}
        extremes = (
            _layers,
            _heads,
            _vocabulary,
            _words,
            _wide,
            _metadata,
            _template,
            _kv_heads,
            _window,
        )
        for extreme in numbers.sample(extremes, numbers.randint(0, 3)):
            for name, value in extreme(numbers).items():
                if isinstance(value, dict):
                    value = {**model.get(name, {}), **value}
                model[name] = value
        if numbers.random() < 0.03:
            model["context"] = 0
        most = numbers.choice((80, 150, 400))
        command = numbers.choices(("run", "plan", "doctor", "calibrate"), (70, 15, 10, 5))[0]
        return cls(
            model, numbers.randrange(50 * MIB, most * MIB), command, _options(numbers, command)
        )

    def write(self, path: Path) -> Path:
        """Write the model to `path`."""
        return write_model(path, **self.model)

    def arguments(self, path: Path, text: Path) -> list[str]:
        """The command line; a calibration on the one line of `text` ends after the model is loaded."""
        budget = ["--memory", str(self.budget_bytes)]
        more = {
            "run": ["--raw", "-p", "Hi", "-n", "2", "-t", "1"],
            "calibrate": ["--text", str(text), "-t", "1"],
        }.get(self.command, [])
        return [self.command, str(path), *budget, *more, *self.options]


def _options(numbers: random.Random, command: str) -> list[str]:
    if command == "doctor":
        return []
    options = []
    if numbers.random() < 0.3:
        options += ["-c", str(numbers.choice((1, 256, 700, 5000, 131_072, 1_000_000, 10_485_760)))]
    if numbers.random() < 0.2:
        options += ["--kv-type", numbers.choice(("f16", "q8_0", "q4_0"))]
    if command != "calibrate" and numbers.random() < 0.3:
        options += ["--attention", numbers.choice(("dense", "tidal"))]
    if command != "calibrate" and numbers.random() < 0.2:
        options += ["--speculate", "auto"]
    return options


def _layers(numbers: random.Random) -> dict[str, Any]:
    return {
        "layers": numbers.choice((1, 48, 200, 500)),
        "width": 32,
        "heads": 1,
        "kv_heads": 1,
        "feed_forward": 32,
    }


def _heads(numbers: random.Random) -> dict[str, Any]:
    heads = numbers.choice((1, 64, 256))
    return {"width": max(2 * heads, 64), "heads": heads, "kv_heads": numbers.choice((1, heads))}


def _vocabulary(numbers: random.Random) -> dict[str, Any]:
    return {"vocabulary": numbers.choice((260, 50_000, 150_000))}


def _words(numbers: random.Random) -> dict[str, Any]:
    return {
        "vocabulary": numbers.choice((400, 3000)),
        "word": "w" * numbers.choice((100, 1000, 4000)),
    }


def _wide(numbers: random.Random) -> dict[str, Any]:
    return {"feed_forward": numbers.choice((32, 20_000, 80_000))}


def _kv_heads(numbers: random.Random) -> dict[str, Any]:
    return {"overrides": {"attention.head_count_kv": numbers.choice((0, 1, 3, 1000))}}


def _window(numbers: random.Random) -> dict[str, Any]:
    return {"overrides": {"attention.sliding_window": numbers.choice((1, 4096, 10_000_000))}}


def _metadata(numbers: random.Random) -> dict[str, Any]:
    length = numbers.choice((1000, 100_000, 1_000_000))
    kind = numbers.choice(("texts", "text", "keys"))
    if kind == "texts":
        return {"extra": {"own.texts": ["x" * numbers.choice((1, 40))] * (length // 4)}}
    if kind == "text":
        return {"extra": {f"own.text{i}": "y" * length for i in range(numbers.choice((1, 40)))}}
    return {"extra": {f"own.key{i}": "z" for i in range(length // 50)}}


def _template(numbers: random.Random) -> dict[str, Any]:
    unit = numbers.choice(UNITS)
    return {"chat_template": unit * (numbers.choice((3000, 30_000, 65_000, 500_000)) // len(unit))}

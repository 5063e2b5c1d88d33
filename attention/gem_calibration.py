"""GemCalibration: the layer that was found to keep what questions ask for in one model, as a file.

Knows no kernel; `gem_calibrate` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide.attention.calibration_file import Fields, find_file, write_values
from lowtide.models.spec import ModelSpec

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GemCalibration:
    """GemFilter's settings for one model, and what they measured.

    `rows` to `last` are the rule, as in `Gem`: for another one the layer says nothing. On questions and
    text that the search did not see, in prompts of up to `context` tokens: of `num_asked` the sentences of
    `num_kept` were kept whole; of the `num_dense_answered` that the whole prompt answers, what was kept
    answers `num_answered`. The share `margin` of k could go, and every sentence be kept still; below 0 one
    was not.
    """

    fingerprint: str
    model: str
    layer: int
    k: int
    rows: int
    weights: str
    heads: str
    pool: str
    pool_size: int
    first: int
    last: int
    num_asked: int
    num_kept: int
    num_dense_answered: int
    num_answered: int
    margin: float
    context: int
    text: str

    @property
    def summary(self) -> str:
        """Say in a few words where the settings come from."""
        return (
            f"calibrated: {self.num_answered} of {self.num_dense_answered} answers kept at "
            f"{self.context:,} tokens"
        )

    def has_rule(self, rule: Mapping[str, Any]) -> bool:
        """Whether it was made for the rule of these settings."""
        return all(getattr(self, name) == value for name, value in rule.items())

    def to_dict(self) -> dict[str, Any]:
        """Return the file's values."""
        return {"format": FORMAT, "policy": "gem", **asdict(self)}


def find_gem_calibration(spec: ModelSpec) -> GemCalibration | None:
    """Return the model's calibration, the user's before the shipped one; None where there is none."""
    path = find_file(_name(spec.fingerprint))
    return load_gem_calibration(path, spec) if path else None


def save_gem_calibration(calibration: GemCalibration, path: Path | None = None) -> Path:
    """Write the file, atomically, and return its path; None is the model's place in the cache."""
    return write_values(_name(calibration.fingerprint), calibration.to_dict(), path)


def load_gem_calibration(path: Path, spec: ModelSpec) -> GemCalibration:
    """Read and check a calibration of the model; raises `CalibrationError`."""
    fields = Fields(path, policy="gem", format=FORMAT)
    found = GemCalibration(
        fingerprint=fields.text("fingerprint"),
        model=fields.text("model"),
        layer=fields.count("layer", least=0),
        k=fields.count("k"),
        rows=fields.count("rows"),
        weights=fields.text("weights"),
        heads=fields.text("heads"),
        pool=fields.text("pool"),
        pool_size=fields.count("pool_size"),
        first=fields.count("first", least=0),
        last=fields.count("last", least=0),
        num_asked=fields.count("num_asked"),
        num_kept=fields.count("num_kept", least=0),
        num_dense_answered=fields.count("num_dense_answered"),
        num_answered=fields.count("num_answered", least=0),
        margin=fields.number("margin", least=-1e9),
        context=fields.count("context"),
        text=fields.text("text"),
    )
    fields.check_model(spec)
    if found.layer >= spec.num_layers:
        raise fields.wrong("layer", f"one of {spec.name}'s layers, 0 to {spec.num_layers - 1},")
    return found


def _name(fingerprint: str) -> str:
    return f"{fingerprint}.gem.json"

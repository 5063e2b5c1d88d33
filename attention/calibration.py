"""Calibration files: JSON named by a model's fingerprint, the user's own before those that ship.

Knows no policy: what the fields mean, the policies' calibrations say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.models.catalog import cache_folder
from lowtide.models.errors import LowtideError
from lowtide.models.spec import ModelSpec

SHIPPED = Path(__file__).with_name("calibrations")


class CalibrationError(LowtideError):
    """A calibration file is broken, or of another model; names the file and the field."""

    exit_code = 2


class NotCalibrated(LowtideError):
    """No setting of a policy stays inside the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationMetrics:
    """Of which model a calibration is, and how far from dense attention its settings measured.

    On text that the search did not see, at `context` tokens: `kl` is the mean KL divergence in nats a
    token, `key_loss` the mean loss of log likelihood of a pass key hidden there, in nats, `keys_read` the
    share of the cached keys that a token attended to, groups of keys counted once.
    """

    fingerprint: str
    model: str
    kl: float
    target_kl: float
    key_loss: float
    target_key_loss: float
    context: int
    keys_read: float
    text: str

    @property
    def summary(self) -> str:
        """Say in a few words where the settings come from."""
        return f"calibrated: KL {self.kl:.3f} at {self.context:,} tokens"


def calibration_folder() -> Path:
    """Return where the user's calibrations lie."""
    return cache_folder() / "calibrations"


def find_file(name: str) -> Path | None:
    """Return the file of that name, the user's before the shipped one; None where there is none."""
    paths = (folder / name for folder in (calibration_folder(), SHIPPED))
    return next((path for path in paths if path.is_file()), None)


def write_values(name: str, values: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write the file, atomically, and return its path; None is the user's folder, under that name.

    Raises `CalibrationError` where it cannot be written.
    """
    path = path or calibration_folder() / name
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise CalibrationError(
            f"the calibration cannot be written to {path}: {error.strerror or error}"
        ) from None
    return path


class Fields:
    """Typed look-ups in a file's values; each raises `CalibrationError` that names the file and the field.

    The file must be of a policy in a format, or this raises, too.
    """

    def __init__(self, path: Path, *, policy: str, format: int) -> None:
        self.path = path
        values = _read(path)
        self._values: dict[str, Any] = values if isinstance(values, dict) else {}
        of = self._values.get("policy")
        if isinstance(of, str) and of != policy:
            raise CalibrationError(
                f"the calibration {path} is of {of!r}, one of {policy!r} is wanted: name another file"
            )
        if of != policy:
            raise self.wrong("policy", repr(policy))
        if self._values.get("format") != format:
            raise self.wrong("format", f"{format}")

    def value(self, field: str) -> Any:
        """Return what the file says, unchecked; None where it says nothing."""
        return self._values.get(field)

    def wrong(self, field: str, wanted: str) -> CalibrationError:
        """Return the error of a field that is not as it is wanted."""
        return CalibrationError(
            f"the calibration {self.path}: {field} is {self.value(field)!r}, {wanted} is wanted; "
            "delete the file, or run lowtide calibrate again"
        )

    def text(self, field: str) -> str:
        """Return a text that is not empty."""
        value = self.value(field)
        if not isinstance(value, str) or not value:
            raise self.wrong(field, "a text")
        return value

    def count(self, field: str, least: int = 1) -> int:
        """Return a whole number of `least` or more."""
        value = self.value(field)
        if not isinstance(value, int) or not is_count(value) or value < least:
            wanted = "a whole number above 0" if least else "a whole number of 0 or more"
            raise self.wrong(field, wanted)
        return value

    def number(self, field: str, least: float = 0) -> float:
        """Return a number of `least` or more."""
        value = self.value(field)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not least <= value < 1e9
        ):
            raise self.wrong(field, "a number of 0 or more" if least == 0 else "a number")
        return float(value)

    def calibration_metrics(self) -> dict[str, Any]:
        """Return the fields of a `CalibrationMetrics`, checked."""
        return {
            **{name: self.text(name) for name in ("fingerprint", "model", "text")},
            **{name: self.number(name) for name in ("kl", "target_kl", "keys_read")},
            **{name: self.number(name) for name in ("key_loss", "target_key_loss")},
            "context": self.count("context"),
        }

    def check_model(self, spec: ModelSpec) -> None:
        """Raise `CalibrationError` where the file is of another model."""
        fingerprint = self.text("fingerprint")
        if fingerprint != spec.fingerprint:
            raise CalibrationError(
                f"the calibration {self.path} is of another model: its fingerprint is {fingerprint[:12]} "
                f"({self.text('model')}), {spec.name} has {spec.fingerprint[:12]}; run lowtide calibrate "
                "for this one"
            )


def is_count(value: object) -> bool:
    """Whether it is a whole number of 0 or more, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CalibrationError(
            f"the calibration {path} cannot be read: {error.strerror or error}"
        ) from None
    except ValueError:
        raise CalibrationError(
            f"the calibration {path} is no JSON: delete it, or run lowtide calibrate again"
        ) from None

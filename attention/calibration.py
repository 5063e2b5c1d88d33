"""Calibration files: the settings of a policy that were found for one model, with what they measured.

One JSON format for all policies: `policy` is the policy's key, `fingerprint` the model's, `metrics` are what
was measured and `params` the settings; the policy knows the meaning of both. Files are named
`<fingerprint>.<policy key>.json`; the user's come before those that ship with lowtide.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from lowtide.models.errors import LowtideError
from lowtide.models.files.folders import CACHE_VARIABLE, cache_folder
from lowtide.models.spec import ModelSpec

SHIPPED = Path(__file__).with_name("calibrations")
FORMAT = 3


class CalibrationError(LowtideError):
    """A calibration file is damaged or belongs to another model; names the file and the field."""

    exit_code = 2


class NotCalibrated(LowtideError):
    """No setting of a policy stays inside the targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The `params` of a policy for one model, and the `metrics` that they measured.

    Measured on `text`, at `context` tokens, on a part of the text that the search did not see. The methods
    that read a param or a metric raise `CalibrationError`, which names the file and the field.
    """

    policy: str
    fingerprint: str
    model: str
    context: int
    text: str
    metrics: Mapping[str, float]
    params: Mapping[str, Any]
    path: Path | None = field(default=None, compare=False)

    @property
    def file_name(self) -> str:
        """The name of its file."""
        return f"{self.fingerprint}.{self.policy}.json"

    @property
    def kl_summary(self) -> str:
        """Describe where the settings come from, by their distance from dense attention."""
        return f"calibrated: KL {self.metric('kl'):.3f} at {self.context:,} tokens"

    @property
    def distance(self) -> str:
        """The measured distance from dense attention in a few words."""
        return f"KL {self.metric('kl'):.4f} at {self.context:,} tokens"

    def to_dict(self) -> dict[str, Any]:
        """Return the file's values."""
        return {
            "format": FORMAT,
            "policy": self.policy,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "context": self.context,
            "text": self.text,
            "metrics": dict(self.metrics),
            "params": dict(self.params),
        }

    def metric(self, name: str) -> float:
        """Return a number that was measured."""
        value = self.metrics.get(name)
        if not is_number(value):
            raise self.error(f"metrics.{name}", value, "a number")
        return value

    def number(self, name: str, least: float = 0) -> float:
        """Return a param: a number of `least` or more."""
        value = self.params.get(name)
        if not is_number(value) or value < least:
            raise self.param_error(name, f"a number of {least:g} or more")
        return float(value)

    def count(self, name: str, least: int = 1) -> int:
        """Return a param: a whole number of `least` or more."""
        value = self.params.get(name)
        if not is_count(value) or value < least:
            raise self.param_error(name, f"a whole number of {least} or more")
        return value

    def word(self, name: str) -> str:
        """Return a param: a text that is not empty."""
        value = self.params.get(name)
        if not isinstance(value, str) or not value:
            raise self.param_error(name, "a text")
        return value

    def param_error(self, name: str, expected: str) -> CalibrationError:
        """Return the error for a param that is not what is `expected`."""
        return self.error(f"params.{name}", self.params.get(name), expected)

    def error(self, name: str, value: object, expected: str) -> CalibrationError:
        """Return the error for a field that is not what is `expected`."""
        return CalibrationError(
            f"the calibration {self.path}: {name} is {value!r}; it must be {expected}. Delete the file, or "
            "run lowtide calibrate again"
        )


def calibration_folder() -> Path | None:
    """Return the folder of the user's calibrations; None for a user without a cache folder."""
    folder = cache_folder()
    return folder / "calibrations" if folder is not None else None


def find_file(name: str) -> Path | None:
    """Return the file of that name, the user's before the shipped one; None if there is none."""
    folders = (calibration_folder(), SHIPPED)
    paths = (folder / name for folder in folders if folder is not None)
    return next((path for path in paths if os.path.isfile(path)), None)


def find_calibration(key: str, spec: ModelSpec) -> Calibration | None:
    """Return the model's calibration of a policy; None if there is none."""
    path = find_file(f"{spec.fingerprint}.{key}.json")
    return load_calibration(path, key, spec) if path else None


def load_calibration(path: Path, key: str, spec: ModelSpec) -> Calibration:
    """Read a calibration of a policy for the model.

    Raises `CalibrationError` if it cannot be read, or belongs to another policy or model.
    """
    values = _read(path)
    found = Calibration(
        policy=values.get("policy", ""),
        fingerprint=values.get("fingerprint", ""),
        model=values.get("model", ""),
        context=values.get("context", 0),
        text=values.get("text", ""),
        metrics=values.get("metrics", {}),
        params=values.get("params", {}),
        path=path,
    )
    if _is_text(found.policy) and found.policy != key:
        raise CalibrationError(
            f"the calibration {path} is for {found.policy!r}, not for {key!r}: name another file"
        )
    for name, is_valid, expected in (
        ("policy", found.policy == key, repr(key)),
        ("format", values.get("format") == FORMAT, str(FORMAT)),
        *(
            (name, _is_text(values.get(name)), "a text")
            for name in ("fingerprint", "model", "text")
        ),
        ("context", is_count(found.context) and found.context > 0, "a whole number of 1 or more"),
        ("metrics", isinstance(found.metrics, dict), "an object"),
        ("params", isinstance(found.params, dict), "an object"),
    ):
        if not is_valid:
            raise found.error(name, values.get(name), expected)
    if found.fingerprint != spec.fingerprint:
        raise CalibrationError(
            f"the calibration {path} belongs to another model: its fingerprint is {found.fingerprint[:12]} "
            f"({found.model}), that of {spec.name} is {spec.fingerprint[:12]}; run lowtide calibrate for "
            "this model"
        )
    return found


def save_calibration(calibration: Calibration, path: Path | None = None) -> Path:
    """Write the file atomically, and return its path; None: into the user's folder."""
    return write_values(calibration.file_name, calibration.to_dict(), path)


def write_values(name: str, values: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write values as JSON, atomically, and return the path; None: into the user's folder, as `name`.

    Raises `CalibrationError` if the file cannot be written.
    """
    if path is None:
        folder = calibration_folder()
        if folder is None:
            raise CalibrationError(
                f"the calibration has no place, because this user has no home folder: set {CACHE_VARIABLE}, "
                "or name an output file"
            )
        path = folder / name
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise CalibrationError(
            f"the calibration cannot be written to {path} ({error.strerror or error}): name another output "
            f"file, or set {CACHE_VARIABLE} to a folder that can be written"
        ) from None
    return path


def is_count(value: object) -> TypeGuard[int]:
    """Whether it is a whole number of 0 or more (a bool is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number (a bool is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CalibrationError(
            f"the calibration {path} cannot be read: {error.strerror or error}"
        ) from None
    except ValueError:
        raise CalibrationError(
            f"the calibration {path} is not JSON: delete it, or run lowtide calibrate again"
        ) from None
    return values if isinstance(values, dict) else {}

"""Calibration: what was found to keep a policy close to dense attention on one model, as a file.

Files are JSON, named by the model's fingerprint: the user's own in the cache folder come before those
that ship. Knows no kernel; `calibrate` makes them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide.models.catalog import cache_folder
from lowtide.models.errors import LowtideError
from lowtide.models.spec import ModelSpec

FORMAT = 2
SHIPPED = Path(__file__).with_name("calibrations")


class CalibrationError(LowtideError):
    """A calibration file is broken, or of another model; names the file and the field."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """TidalDecode's settings for one model and how far from dense attention they measured.

    On text that the search did not see, at `context` tokens: `kl` is the mean KL divergence in nats a
    token, `key_loss` the mean loss of log likelihood of a pass key hidden there, in nats, `keys_read` the
    share of the cached keys that a token attended to.
    """

    fingerprint: str
    model: str
    k: int
    selection_layers: tuple[int, ...]
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

    def to_dict(self) -> dict[str, Any]:
        """Return the file's values."""
        return {"format": FORMAT, "policy": "tidal", **asdict(self)}


def find_calibration(spec: ModelSpec) -> Calibration | None:
    """Return the model's calibration, the user's before the shipped one; None where there is none."""
    for folder in (calibration_folder(), SHIPPED):
        path = folder / f"{spec.fingerprint}.json"
        if path.is_file():
            return load_calibration(path, spec)
    return None


def calibration_folder() -> Path:
    """Return where the user's calibrations lie."""
    return cache_folder() / "calibrations"


def save_calibration(calibration: Calibration, path: Path | None = None) -> Path:
    """Write the file, atomically, and return its path; None is the model's place in the cache."""
    path = path or calibration_folder() / f"{calibration.fingerprint}.json"
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(calibration.to_dict(), indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise CalibrationError(
            f"the calibration cannot be written to {path}: {error.strerror or error}"
        ) from None
    return path


def load_calibration(path: Path, spec: ModelSpec) -> Calibration:
    """Read and check a calibration of the model; raises `CalibrationError`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CalibrationError(
            f"the calibration {path} cannot be read: {error.strerror or error}"
        ) from None
    except ValueError:
        raise CalibrationError(
            f"the calibration {path} is no JSON: delete it, or run lowtide calibrate again"
        ) from None
    found = _Fields(path, values).calibration()
    if found.fingerprint != spec.fingerprint:
        raise CalibrationError(
            f"the calibration {path} is of another model: its fingerprint is {found.fingerprint[:12]} "
            f"({found.model}), {spec.name} has {spec.fingerprint[:12]}; run lowtide calibrate for this one"
        )
    outside = [layer for layer in found.selection_layers if not 0 <= layer < spec.num_layers]
    if outside:
        raise CalibrationError(
            f"the calibration {path}: selection_layers name layer {outside[0]}, {spec.name} has "
            f"{spec.num_layers} layers"
        )
    return found


class _Fields:
    """Typed look-ups in a file's values, with errors that name the field."""

    def __init__(self, path: Path, values: object) -> None:
        self._path = path
        self._values: dict[str, Any] = values if isinstance(values, dict) else {}

    def calibration(self) -> Calibration:
        if self._values.get("format") != FORMAT:
            raise self._wrong("format", f"{FORMAT}")
        layers = self._values.get("selection_layers")
        if not isinstance(layers, list) or not layers or not all(map(_is_count, layers)):
            raise self._wrong("selection_layers", "a list of layer numbers")
        if layers != sorted(set(layers)):
            raise self._wrong("selection_layers", "each layer once, in order,")
        return Calibration(
            fingerprint=self._text("fingerprint"),
            model=self._text("model"),
            k=self._count("k"),
            selection_layers=tuple(layers),
            kl=self._number("kl"),
            target_kl=self._number("target_kl"),
            key_loss=self._number("key_loss"),
            target_key_loss=self._number("target_key_loss"),
            context=self._count("context"),
            keys_read=self._number("keys_read"),
            text=self._text("text"),
        )

    def _wrong(self, field: str, wanted: str) -> CalibrationError:
        return CalibrationError(
            f"the calibration {self._path}: {field} is {self._values.get(field)!r}, {wanted} is wanted; "
            "delete the file, or run lowtide calibrate again"
        )

    def _text(self, field: str) -> str:
        value = self._values.get(field)
        if not isinstance(value, str) or not value:
            raise self._wrong(field, "a text")
        return value

    def _count(self, field: str) -> int:
        value = self._values.get(field)
        if not isinstance(value, int) or not _is_count(value) or value == 0:
            raise self._wrong(field, "a whole number above 0")
        return value

    def _number(self, field: str) -> float:
        value = self._values.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise self._wrong(field, "a number of 0 or more")
        return float(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

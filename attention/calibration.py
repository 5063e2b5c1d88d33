"""Calibration: what was found to keep TidalDecode close to dense attention on one model, as a file.

Knows no kernel; `calibrate` makes them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide.attention.calibration_file import (
    CalibrationError,
    Closeness,
    Fields,
    find_file,
    is_count,
    write_values,
)
from lowtide.models.spec import ModelSpec

FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(Closeness):
    """TidalDecode's settings for one model, and how far from dense attention they measured."""

    k: int
    selection_layers: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the file's values."""
        return {"format": FORMAT, "policy": "tidal", **asdict(self)}


def find_calibration(spec: ModelSpec) -> Calibration | None:
    """Return the model's calibration, the user's before the shipped one; None where there is none."""
    path = find_file(f"{spec.fingerprint}.json")
    return load_calibration(path, spec) if path else None


def save_calibration(calibration: Calibration, path: Path | None = None) -> Path:
    """Write the file, atomically, and return its path; None is the model's place in the cache."""
    return write_values(f"{calibration.fingerprint}.json", calibration.to_dict(), path)


def load_calibration(path: Path, spec: ModelSpec) -> Calibration:
    """Read and check a calibration of the model; raises `CalibrationError`."""
    fields = Fields(path, policy="tidal", format=FORMAT)
    found = Calibration(k=fields.count("k"), selection_layers=_layers(fields), **fields.closeness())
    fields.check_model(spec)
    outside = [layer for layer in found.selection_layers if not 0 <= layer < spec.num_layers]
    if outside:
        raise CalibrationError(
            f"the calibration {path}: selection_layers name layer {outside[0]}, {spec.name} has "
            f"{spec.num_layers} layers"
        )
    return found


def _layers(fields: Fields) -> tuple[int, ...]:
    layers = fields.value("selection_layers")
    if not isinstance(layers, list) or not layers or not all(map(is_count, layers)):
        raise fields.wrong("selection_layers", "a list of layer numbers")
    if layers != sorted(set(layers)):
        raise fields.wrong("selection_layers", "each layer once, in order,")
    return tuple(layers)

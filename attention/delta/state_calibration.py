"""StateCalibration: what keeps delta by blocks close to dense attention on one model, as a file.

Knows no kernel; `calibrate` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from lowtide.attention.calibration_file import Closeness, Fields, find_file, write_values
from lowtide.attention.delta.calibration import number_words, numbers_of, scales_of
from lowtide.attention.delta.state_units import LEFT_DENSE, StateUnits
from lowtide.models.spec import ModelSpec

FORMAT = 2
"""1 had thresholds for keys that were compared with the last one sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCalibration(Closeness):
    """Delta's units by blocks for one model, and how far from dense attention they measured."""

    units: StateUnits

    def to_dict(self) -> dict[str, Any]:
        """Return the file's values; a layer's numbers are a text, and so are its heads' scales, in hex."""
        measured = {field.name: getattr(self, field.name) for field in fields_of(Closeness)}
        units = self.units
        return {
            "format": FORMAT,
            "policy": policy_name(units.block),
            **measured,
            "sparsity": round(units.sparsity or 0.0, 4),
            "thresholds": number_words(units.thresholds),
            "roots": number_words(units.roots),
            "scales": [" ".join(unit.hex() for unit in layer) for layer in units.scales],
        }


def policy_name(block: int) -> str:
    """Return what such a file says that it is of."""
    return f"delta-block{block}" if block > 1 else "delta-element"


def find_state_calibration(spec: ModelSpec, block: int) -> StateCalibration | None:
    """Return the model's calibration, the user's before the shipped one; None where there is none."""
    path = find_file(f"{spec.fingerprint}.{policy_name(block)}.json")
    return load_state_calibration(path, spec, block) if path else None


def save_state_calibration(calibration: StateCalibration, path: Path | None = None) -> Path:
    """Write the file, atomically, and return its path; None is the model's place in the cache."""
    name = f"{calibration.fingerprint}.{policy_name(calibration.units.block)}.json"
    return write_values(name, calibration.to_dict(), path)


def load_state_calibration(path: Path, spec: ModelSpec, block: int) -> StateCalibration:
    """Read and check a calibration of the model, for blocks of that size; raises `CalibrationError`."""
    fields = Fields(path, policy=policy_name(block), format=FORMAT)
    units = StateUnits(
        block=block,
        thresholds=numbers_of(fields, "thresholds", spec, LEFT_DENSE),
        roots=numbers_of(fields, "roots", spec, 0.0),
        scales=scales_of(fields, spec),
        sparsity=fields.number("sparsity"),
    )
    found = StateCalibration(units=units, **fields.closeness())
    fields.check_model(spec)
    return found

"""DeltaCalibration: what was found to keep delta close to dense attention on one model, as a file.

Knows no kernel; `calibrate` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from lowtide.attention.calibration_file import Closeness, Fields, find_file, write_values
from lowtide.attention.delta.units import LEAST_GROUPS, DeltaUnits
from lowtide.memory.key_groups import PAGE_KEYS
from lowtide.models.spec import ModelSpec

FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaCalibration(Closeness):
    """Delta's units for one model, and how far from dense attention they measured."""

    units: DeltaUnits

    def to_dict(self) -> dict[str, Any]:
        """Return the file's values; a layer's groups are a text, and so are its heads' scales, in hex."""
        measured = {field.name: getattr(self, field.name) for field in fields_of(Closeness)}
        return {
            "format": FORMAT,
            "policy": "delta",
            **measured,
            "sparsity": round(self.units.sparsity, 4),
            "num_groups": [" ".join(map(str, layer)) for layer in self.units.num_groups],
            "lifts": number_words(self.units.lifts),
            "scales": [" ".join(unit.hex() for unit in layer) for layer in self.units.scales],
        }


def find_delta_calibration(spec: ModelSpec) -> DeltaCalibration | None:
    """Return the model's calibration, the user's before the shipped one; None where there is none."""
    path = find_file(f"{spec.fingerprint}.delta.json")
    return load_delta_calibration(path, spec) if path else None


def save_delta_calibration(calibration: DeltaCalibration, path: Path | None = None) -> Path:
    """Write the file, atomically, and return its path; None is the model's place in the cache."""
    return write_values(f"{calibration.fingerprint}.delta.json", calibration.to_dict(), path)


def load_delta_calibration(path: Path, spec: ModelSpec) -> DeltaCalibration:
    """Read and check a calibration of the model; raises `CalibrationError`."""
    fields = Fields(path, policy="delta", format=FORMAT)
    units = DeltaUnits(
        num_groups=_groups(fields, spec),
        lifts=numbers_of(fields, "lifts", spec, 0.0),
        scales=scales_of(fields, spec),
    )
    found = DeltaCalibration(units=units, **fields.closeness())
    fields.check_model(spec)
    return found


def _groups(fields: Fields, spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    wanted = f"{LEAST_GROUPS} to {PAGE_KEYS} for each KV head of {spec.num_layers} layers"
    layers = layer_words(fields, "num_groups", spec, wanted)
    numbers = [tuple(int(word) for word in layer if word.isdecimal()) for layer in layers]
    if any(
        len(layer) != heads or not all(LEAST_GROUPS <= n <= PAGE_KEYS for n in layer)
        for layer, heads in zip(numbers, spec.num_kv_heads, strict=True)
    ):
        raise fields.wrong("num_groups", wanted)
    return tuple(numbers)


def scales_of(fields: Fields, spec: ModelSpec) -> tuple[tuple[bytes, ...], ...]:
    """Return each KV head's scales, a byte a channel."""
    wanted = f"{spec.key_head_size} bytes in hex for each KV head of {spec.num_layers} layers"
    try:
        layers = [
            tuple(bytes.fromhex(word) for word in layer)
            for layer in layer_words(fields, "scales", spec, wanted)
        ]
    except ValueError:
        raise fields.wrong("scales", wanted) from None
    for layer, heads in zip(layers, spec.num_kv_heads, strict=True):
        if len(layer) != heads or any(len(unit) != spec.key_head_size for unit in layer):
            raise fields.wrong("scales", wanted)
    return tuple(layers)


def number_words(numbers: tuple[tuple[float, ...], ...]) -> list[str]:
    """Return each layer's numbers as a text."""
    return [" ".join(f"{number:g}" for number in layer) for layer in numbers]


def numbers_of(
    fields: Fields, field: str, spec: ModelSpec, least: float
) -> tuple[tuple[float, ...], ...]:
    """Return each KV head's number."""
    wanted = f"numbers of {least:g} to 1e9 for each KV head of {spec.num_layers} layers"
    try:
        numbers = [tuple(map(float, words)) for words in layer_words(fields, field, spec, wanted)]
    except ValueError:
        raise fields.wrong(field, wanted) from None
    if any(
        len(layer) != heads or not all(least <= number <= 1e9 for number in layer)
        for layer, heads in zip(numbers, spec.num_kv_heads, strict=True)
    ):
        raise fields.wrong(field, wanted)
    return tuple(numbers)


def layer_words(fields: Fields, field: str, spec: ModelSpec, wanted: str) -> list[list[str]]:
    """Return the words of each layer's text."""
    layers = fields.value(field)
    if (
        not isinstance(layers, list)
        or len(layers) != spec.num_layers
        or not all(isinstance(layer, str) for layer in layers)
    ):
        raise fields.wrong(field, wanted)
    return [layer.split() for layer in layers]

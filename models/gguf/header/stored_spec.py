"""A GGUF model's spec as values of JSON, and back: reading a vocabulary's header takes up to a tenth of a second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lowtide.models.facts.store import Facts
from lowtide.models.gguf.header import file_types, kind, reader, sliding
from lowtide.models.spec import ModelSpec, VocabularySpec, WeightGroup, WeightSpan

CODE = tuple(Path(module.__file__ or "") for module in (reader, kind, sliding, file_types))
"""The modules that decide what a header means: what they read is stored until they change."""


def stored_spec(facts: Facts, path: Path) -> ModelSpec | None:
    """Return the stored spec of the model at `path`; None where there is none that holds."""
    values = facts.read()
    try:
        return None if values is None else from_values(values, path)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def store_spec(facts: Facts, spec: ModelSpec, code: Path) -> None:
    """Store a spec until its files, or the modules that read it, change; `code` is one of these modules.

    Nothing is stored of tensor types that the installed ggml alone knows, nor of a spec that JSON would change.
    """
    if not spec.tensor_types <= reader.TYPE_NUMBERS.keys():
        return
    values = to_values(spec)
    if from_values(json.loads(json.dumps(values)), spec.path) == spec:
        facts.write(values, (*spec.paths, code, Path(__file__), *CODE))


def to_values(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of a spec as JSON has them; of its files the names alone."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    values["paths"] = [path.name for path in spec.paths]
    values["tensor_types"] = sorted(spec.tensor_types)
    vocabulary = spec.vocabulary
    values["vocabulary"] = [
        vocabulary.num_tokens,
        vocabulary.num_merges,
        vocabulary.text_bytes,
    ]
    values["weight_groups"] = [
        [
            group.layer,
            [[span.part, span.offset, span.num_bytes] for span in group.spans],
            group.name,
            group.projection_bytes,
        ]
        for group in spec.weight_groups
    ]
    return values


def from_values(values: Mapping[str, Any], path: Path) -> ModelSpec:
    """Return the spec of these values, with its files beside `path`; raise `TypeError` for others than a spec's."""
    found: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    num_tokens, num_merges, text_bytes = values["vocabulary"]
    found["paths"] = tuple(path.with_name(name) for name in values["paths"])
    found["tensor_types"] = frozenset(values["tensor_types"])
    found["vocabulary"] = VocabularySpec(
        num_tokens=num_tokens, num_merges=num_merges, text_bytes=text_bytes
    )
    found["weight_groups"] = tuple(
        WeightGroup(layer, tuple(WeightSpan(*span) for span in spans), name, projection_bytes)
        for layer, spans, name, projection_bytes in values["weight_groups"]
    )
    return ModelSpec(**found)

"""Validator: whether a finished JSON answer follows its schema, and where in the text it stopped following it.

It uses the package jsonschema. Nothing is fetched: a schema of another place is refused. Regular expressions run in
llguidance's automata, whose time is linear in the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from lowtide.models.errors import BadOption
from lowtide.runtime.structured.schema import keywords_of


@dataclass(frozen=True, slots=True)
class Violation:
    """What an answer does wrong; the text up to byte `end` has it already, whatever follows."""

    reason: str
    end: int


class Validator:
    """Checks answers against one schema; raises `BadOption` for a schema that cannot be checked.

    An unknown `format` is a remark and no rule, as JSON Schema has it.
    """

    def __init__(self, schema: Any) -> None:
        if find_spec("jsonschema") is None:
            raise BadOption(
                "a schema that is verified at the end needs the package jsonschema, which is not installed: "
                "pip install 'lowtide[structured]'"
            )
        import jsonschema
        import referencing

        for pointer, keyword, value in keywords_of(schema):
            if keyword in ("$ref", "$dynamicRef") and not str(value).startswith("#"):
                raise BadOption(
                    f"the JSON schema cannot be verified: {keyword} at {pointer} names a schema elsewhere; copy "
                    "it into $defs"
                )
        made = jsonschema.validators.validator_for(schema)
        try:
            made.check_schema(schema)
        except jsonschema.SchemaError as error:
            where = "/".join(map(str, error.absolute_path))
            raise BadOption(
                f"the JSON schema is not valid: {_short(error.message)} at /{where}; correct it"
            ) from None
        except RecursionError:
            raise BadOption("the JSON schema is nested too deeply: flatten it") from None
        extended = jsonschema.validators.extend(made, {"pattern": _pattern})
        self._validator = extended(
            schema, registry=referencing.Registry(), format_checker=made.FORMAT_CHECKER
        )

    def violation(self, text: bytes) -> Violation | None:
        """Return what is wrong with an answer that is JSON; None where it follows the schema."""
        import jsonschema
        import referencing

        try:
            errors = self._validator.iter_errors(json.loads(text))
            found = [
                Violation(_short(error.message), _end_of(text, list(error.absolute_path)))
                for error in _first(errors)
            ]
        except RecursionError:
            return Violation("it is nested too deeply", len(text))
        except (jsonschema.exceptions.UndefinedTypeCheck, referencing.exceptions.Unresolvable) as e:
            raise BadOption(
                f"the JSON schema cannot be verified: {_short(str(e))}; correct it"
            ) from None
        except ValueError as error:
            return Violation(f"it is not JSON ({error})", len(text))
        return min(found, key=lambda one: one.end, default=None)


def _first(errors: Iterator[Any], most: int = 20) -> Iterator[Any]:
    for _, error in zip(range(most), errors, strict=False):
        yield error


def _short(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= 120 else line[:117] + "..."


def _pattern(validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[Any]:
    """Check the keyword `pattern` in linear time: Python's `re` may need time that doubles with each character."""
    from jsonschema import ValidationError

    from lowtide.runtime.structured.verified.linear_match import matches

    if validator.is_type(instance, "string") and not matches(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _end_of(text: bytes, path: Sequence[str | int]) -> int:
    """Return where the value at a path of keys and indices ends in a JSON text, in bytes."""
    decoder, written = json.JSONDecoder(), text.decode()
    at = _skip(written, 0)
    for step in path:
        at = _skip(written, at + 1)
        count = 0
        while True:
            if isinstance(step, str):
                key, at = decoder.raw_decode(written, at)
                at = _skip(written, _skip(written, at) + 1)
                # A name that occurs twice has the last value: go on until no later one follows.
                if key == step and not _occurs_again(decoder, written, at, step):
                    break
            elif count == step:
                break
            _, at = decoder.raw_decode(written, at)
            at = _skip(written, _skip(written, at) + 1)
            count += 1
    _, end = decoder.raw_decode(written, at)
    return len(written[:end].encode())


def _occurs_again(decoder: json.JSONDecoder, written: str, at: int, name: str) -> bool:
    _, at = decoder.raw_decode(written, at)
    at = _skip(written, at)
    while written[at] == ",":
        key, at = decoder.raw_decode(written, _skip(written, at + 1))
        if key == name:
            return True
        at = _skip(written, _skip(written, at) + 1)
        _, at = decoder.raw_decode(written, at)
        at = _skip(written, at)
    return False


def _skip(written: str, at: int) -> int:
    """Return where white space ends."""
    while at < len(written) and written[at] in " \t\r\n":
        at += 1
    return at

"""Types of Python as JSON schemas, and values of these types from JSON, without any package.

It reads dataclasses, TypedDict, Enum, Literal, Union, NewType, list, tuple, dict with texts as keys, and the types of
JSON itself.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Mapping
from typing import (
    Any,
    Literal,
    NewType,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    None: {"type": "null"},
    Any: {},
}


class NotReadable(Exception):
    """A type that has no JSON schema here."""


class PythonType:
    """A type and its JSON schema; raises `NotReadable` for a type that is none of the above."""

    def __init__(self, of: Any) -> None:
        self._of = of
        self._names: dict[Any, str] = {}
        self._definitions: dict[str, Any] = {}
        schema = self._schema(of)
        self.schema = {**schema, "$defs": self._definitions} if self._definitions else schema

    def value(self, parsed: Any) -> Any:
        """Return parsed JSON of the schema as a value of the type."""
        return _value(self._of, parsed)

    def _schema(self, of: Any) -> dict[str, Any]:
        of = _without_name(of)
        if _is_plain(of):
            return dict(_PLAIN[of])
        if _has_fields(of):
            return {"$ref": f"#/$defs/{self._named(of)}"}
        if isinstance(of, type) and issubclass(of, enum.Enum):
            return {"enum": [_literal(member.value) for member in of]}
        origin, inside = get_origin(of), get_args(of)
        if origin is Literal:
            return {"enum": [_literal(value) for value in inside]}
        if origin in (Union, types.UnionType):
            return {"anyOf": [self._schema(one) for one in inside]}
        return self._container(origin or of, inside)

    def _container(self, origin: Any, inside: tuple[Any, ...]) -> dict[str, Any]:
        if origin is list or (origin is tuple and inside[1:] == (...,)):
            return {"type": "array", "items": self._schema(inside[0] if inside else Any)}
        if origin is tuple and inside:
            return {
                "type": "array",
                "prefixItems": [self._schema(one) for one in inside],
                "items": False,
                "minItems": len(inside),
            }
        if origin is dict and (not inside or inside[0] is str):
            values = self._schema(inside[1] if inside else Any)
            return {"type": "object", "additionalProperties": values}
        raise NotReadable(f"{getattr(origin, '__name__', origin)} has no JSON schema")

    def _named(self, of: Any) -> str:
        """Return the name of a class's definition, which is made first where it is new: a class may contain itself."""
        if of not in self._names:
            name = str(of.__name__)
            if name in self._definitions:
                name += str(len(self._names))
            self._names[of] = name
            self._definitions[name] = {}
            fields, required = _fields(of)
            self._definitions[name] = {
                "type": "object",
                "properties": {field: self._schema(one) for field, one in fields.items()},
                "required": required,
                "additionalProperties": False,
            }
        return self._names[of]


def _without_name(of: Any) -> Any:
    """Return the type that a `NewType` names."""
    while isinstance(of, NewType):
        of = of.__supertype__
    return of


def _is_plain(of: Any) -> bool:
    try:
        return of in _PLAIN
    except TypeError:  # cannot be hashed
        return False


def _has_fields(of: Any) -> bool:
    return isinstance(of, type) and (dataclasses.is_dataclass(of) or is_typeddict(of))


def _literal(value: Any) -> Any:
    if not isinstance(value, str | int | float | bool | None) or isinstance(value, enum.Enum):
        raise NotReadable(f"{value!r} is no value of JSON")
    return value


def _fields(of: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the types of a class's fields by name, and the names of those that a value must have."""
    try:
        hints = get_type_hints(of, include_extras=True)
        plain = get_type_hints(of)
    except (NameError, TypeError) as error:
        raise NotReadable(f"a type of {of.__name__} is not known ({error})") from None
    if dataclasses.is_dataclass(of):
        fields = [field for field in dataclasses.fields(of) if field.init]
        missing = dataclasses.MISSING
        return {field.name: plain[field.name] for field in fields}, [
            field.name for field in fields if field.default is field.default_factory is missing
        ]
    # A class under `from __future__ import annotations` does not know which of its fields are wrapped.
    is_required = {
        name: origin is Required or (origin is not NotRequired and name in of.__required_keys__)
        for name, origin in ((name, get_origin(hint)) for name, hint in hints.items())
    }
    return plain, [name for name, needed in is_required.items() if needed]


def _value(of: Any, parsed: Any) -> Any:
    of = _without_name(of)
    if _is_plain(of):
        return float(parsed) if of is float else parsed
    if isinstance(of, type) and issubclass(of, enum.Enum):
        return of(parsed)
    if _has_fields(of):
        fields, _ = _fields(of)
        return of(**{name: _value(fields[name], one) for name, one in parsed.items()})
    origin, inside = get_origin(of), get_args(of)
    if origin is Literal:
        return parsed
    if origin in (Union, types.UnionType):
        return _value(next((one for one in inside if _fits(one, parsed)), Any), parsed)
    if isinstance(parsed, Mapping):
        return {key: _value(inside[1], one) if inside else one for key, one in parsed.items()}
    if (origin or of) is tuple and inside[1:] != (...,):
        return tuple(_value(one, value) for one, value in zip(inside, parsed, strict=True))
    values = [_value(inside[0], one) if inside else one for one in parsed]
    return tuple(values) if (origin or of) is tuple else values


def _fits(of: Any, parsed: Any) -> bool:
    """Whether parsed JSON is of a type: of a union, the first that fits is taken."""
    of = _without_name(of)
    if _is_plain(of):
        number = of is float and type(parsed) is int
        return of is Any or number or type(parsed) is (type(None) if of is None else of)
    if isinstance(of, type) and issubclass(of, enum.Enum):
        return any(_is_same(member.value, parsed) for member in of)
    if _has_fields(of):
        fields, required = _fields(of)
        return (
            isinstance(parsed, Mapping)
            and all(name in parsed for name in required)
            and all(name in fields and _fits(fields[name], one) for name, one in parsed.items())
        )
    origin, inside = get_origin(of), get_args(of)
    if origin is Literal:
        return any(_is_same(one, parsed) for one in inside)
    if origin in (Union, types.UnionType):
        return any(_fits(one, parsed) for one in inside)
    if (origin or of) is dict:
        return isinstance(parsed, Mapping) and all(
            not inside or _fits(inside[1], one) for one in parsed.values()
        )
    if not isinstance(parsed, list):
        return False
    if (origin or of) is tuple and inside[1:] != (...,):
        return len(parsed) == len(inside) and all(map(_fits, inside, parsed))
    return all(not inside or _fits(inside[0], one) for one in parsed)


def _is_same(value: Any, parsed: Any) -> bool:
    """Whether two values are the same in JSON, where True is not 1."""
    return isinstance(value, bool) == isinstance(parsed, bool) and bool(value == parsed)

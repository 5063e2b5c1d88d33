"""FunctionReader: a function of Python as a tool: its JSON schema, and its arguments from JSON."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from lowtide.models.errors import BadOption
from lowtide.runtime.structured.formats import schema_of_type

Reader = Callable[[str], Any]
"""Reads an argument from its JSON text."""
_PARAMETER_LINE = re.compile(r"^\s*(?:`|:param\s+)?(\w+)`?\s*(?:\([^)]*\))?\s*:\s*(\S.*)$")


class FunctionReader:
    """Reads types and defaults from a signature, and words from a docstring.

    `parameters` is the JSON schema of the arguments, and `readers` make values of the annotated types from JSON, by the
    parameter's name. A parameter without an annotation is a text. Raises `BadOption` for a function that cannot be
    a tool.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name: str = getattr(function, "__name__", type(function).__name__)
        if inspect.iscoroutinefunction(function):
            raise BadOption(
                f"the function {self.name} is a coroutine: pass a function that runs it, such as with asyncio.run"
            )
        try:
            hints, signature = get_type_hints(function), inspect.signature(function)
        except Exception as error:  # annotations may name anything
            raise BadOption(f"the function {self.name} cannot be read as a tool: {error}") from None
        self.description, self._about = _docstring(inspect.getdoc(function) or "")
        self.readers: dict[str, Reader] = {}
        self._definitions: dict[str, Any] = {}
        properties, required = dict[str, Any](), list[str]()
        for parameter in signature.parameters.values():
            self._check_kind(parameter)
            properties[parameter.name] = self._property(
                parameter, hints.get(parameter.name, str), function
            )
            if parameter.default is parameter.empty:
                required.append(parameter.name)
        self.parameters: dict[str, Any] = {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
        if self._definitions:
            self.parameters["$defs"] = self._definitions

    def _check_kind(self, parameter: inspect.Parameter) -> None:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise BadOption(
                f"the function {self.name} takes *{parameter.name}: write its parameters one by one"
            )
        if parameter.kind == parameter.POSITIONAL_ONLY:
            raise BadOption(
                f"the function {self.name} takes {parameter.name} by position alone: take the / out of its signature"
            )

    def _property(
        self, parameter: inspect.Parameter, hint: Any, function: Callable[..., Any]
    ) -> dict[str, Any]:
        """Return the schema of a parameter, and remember how to read it."""
        try:
            schema, self.readers[parameter.name] = schema_of_type(hint)
        except BadOption as error:
            raise BadOption(
                f"the parameter {parameter.name} of the function {self.name} cannot be used: {error}"
            ) from None
        schema = dict(schema)
        for name, definition in schema.pop("$defs", {}).items():
            if self._definitions.setdefault(name, definition) != definition:
                raise BadOption(
                    f"the function {function.__name__} takes two classes with the name {name}: rename one of them"
                )
        if parameter.name in self._about:
            schema["description"] = self._about[parameter.name]
        if parameter.default is not parameter.empty and _is_plain(parameter.default):
            schema["default"] = parameter.default
        return schema


def written_result(value: Any) -> str:
    """Return what a function returned as a model reads it: a text as it is, other values as JSON."""
    if isinstance(value, str):
        return value
    to_json = getattr(value, "model_dump_json", None)
    if callable(to_json):
        return str(to_json())
    fields = getattr(value, "__dataclass_fields__", None)
    if isinstance(fields, Mapping):
        value = {name: getattr(value, name) for name in fields}
    return json.dumps(value, ensure_ascii=False, default=str)


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (str, int, float, bool)


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the first paragraph of a docstring, and what it says of parameters."""
    first = " ".join(text.split("\n\n", 1)[0].split())
    about = {}
    for line in text.splitlines()[1:]:
        found = _PARAMETER_LINE.match(line)
        if found:
            about[found[1]] = found[2].strip()
    return first, about

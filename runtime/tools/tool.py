"""Tool: a function that a model may call, from OpenAI's JSON form or from a function of Python."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadOption
from lowtide.runtime.tools.function import FunctionReader, Reader, written_result

MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 64 << 10
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_ERROR_LENGTH = 500
"""The most characters of an error of a function that a model reads."""


@dataclass(frozen=True)
class Tool:
    """A function by its name, what it does, and the JSON schema of its arguments.

    `run` computes it; None where the caller does. `readers` make its arguments of JSON texts, by their names; others
    are passed as parsed. Raises `BadOption` for what cannot be a tool.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[..., Any] | None = None
    readers: Mapping[str, Reader] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise BadOption(
                f"a tool has the name {shown(self.name)}; it must have 1 to 64 letters, digits, and . _ -"
            )
        kind = (
            self.parameters.get("type", "object") if isinstance(self.parameters, Mapping) else None
        )
        if kind != "object":
            raise BadOption(
                f"the parameters of the tool {self.name} are {shown(self.parameters)}; they must be a JSON schema of "
                "an object"
            )
        try:
            size = len(json.dumps(self.parameters).encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise BadOption(
                f"the parameters of the tool {self.name} are no JSON: {error}"
            ) from None
        if size > MAX_SCHEMA_BYTES:
            raise BadOption(
                f"the parameters of the tool {self.name} have {size:,} bytes, but at most {MAX_SCHEMA_BYTES:,} can be "
                "used: shorten them"
            )

    @classmethod
    def of(cls, value: Any) -> Tool:
        """Return a tool from a function, a tool, or OpenAI's form of one."""
        if isinstance(value, Tool):
            return value
        if isinstance(value, Mapping):
            return cls._of_mapping(value)
        if callable(value):
            return cls.of_function(value)
        raise BadOption(
            f'a tool is {shown(value)}; it must be a function, or {{"type": "function", "function": {{...}}}}'
        )

    @classmethod
    def _of_mapping(cls, value: Mapping[str, Any]) -> Tool:
        kind = value.get("type", "function")
        if kind != "function":
            raise BadOption(f"a tool has the type {shown(kind)}, but lowtide knows functions alone")
        function = value.get("function", value)
        if not isinstance(function, Mapping):
            raise BadOption(f"a tool has the function {shown(function)}; it must be an object")
        parameters = function.get("parameters")
        return cls(
            function.get("name", ""),
            str(function.get("description") or ""),
            {"type": "object", "properties": {}} if parameters is None else parameters,
        )

    @classmethod
    def of_function(cls, function: Callable[..., Any]) -> Tool:
        """Return a tool from a function: types from its annotations, words from its docstring."""
        read = FunctionReader(function)
        return cls(read.name, read.description, read.parameters, function, read.readers)

    def call(self, arguments: str) -> str:
        """Run the tool with arguments as JSON text, and return its result as a model reads it.

        What goes wrong is a sentence for the model, which may call again: a function may raise anything.
        """
        assert self.run is not None
        try:
            parsed = json.loads(arguments)
            values = {
                name: self.readers[name](json.dumps(one)) if name in self.readers else one
                for name, one in parsed.items()
            }
        except Exception as error:  # the readers of types raise their own
            return f"Error: the arguments of {self.name} cannot be read: {_sentence(error)}"
        try:
            return written_result(self.run(**values))
        except Exception as error:
            return f"Error: {self.name} failed: {_sentence(error)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the tool in OpenAI's form, as chat templates want it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


def tools_of(values: Sequence[Any]) -> list[Tool]:
    """Return tools with names of their own; raises `BadOption` for others."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise BadOption(f"tools is {shown(values)}; it must be a list of functions or tools")
    if len(values) > MAX_TOOLS:
        raise BadOption(f"there are {len(values)} tools, and at most {MAX_TOOLS} can be used")
    tools = [Tool.of(value) for value in values]
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadOption(f"two tools have the name {twice}: rename one of them")
    return tools


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_ERROR_LENGTH]}"

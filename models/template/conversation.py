"""From the caller's messages, tools and arguments to what a template gets, with their origin marked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowtide.models.errors import TemplateError
from lowtide.models.template.allowance import Allowance
from lowtide.models.template.message import is_templates_own
from lowtide.models.template.traced_text import all_message

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names that a message may give its reasoning; templates read the first two."""
ABSENCES = ((False, False), (True, False), (False, True))
"""`nulls` and `empty` of the forms of a message with None, the best first."""
OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")
"""Variables of a template that no argument may set."""


@dataclass(frozen=True, slots=True)
class Form:
    """In which of several forms a conversation is rendered: templates differ in what they expect.

    `developer` has the role "developer" as it is, else it is "system". `parts` has lists of text parts as they are,
    else they are joined. `arguments` has the arguments of tool calls as they are, else a JSON text becomes a dict
    and a dict a JSON text. Keys whose value is None are left out, as transformers does; `nulls` has them as they
    are, and `empty` has an empty content instead of none.
    """

    developer: bool = True
    parts: bool = True
    arguments: bool = True
    nulls: bool = False
    empty: bool = False

    def applied(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the message in this form, and its reasoning under each name that templates read."""
        changed = {key: value for key, value in message.items() if self.nulls or value is not None}
        reasoning = next(
            (message[name] for name in REASONING if message.get(name) is not None), None
        )
        if reasoning is not None:
            changed = {"thinking": reasoning, **changed, "reasoning_content": reasoning}
        if not self.developer and message["role"] == "developer":
            changed["role"] = "system"
        content = message.get("content")
        if self.empty and content is None:
            changed["content"] = ""
        if not self.parts and isinstance(content, (list, tuple)):
            changed["content"] = "\n".join(part["text"] for part in content)
        if not self.arguments and isinstance(message.get("tool_calls"), (list, tuple)):
            changed["tool_calls"] = [_other_arguments(call) for call in message["tool_calls"]]
        return changed


def forms_of(messages: Sequence[Mapping[str, Any]], source: str) -> Iterator[Form]:
    """Yield the forms to try, the best first; a conversation of plain texts has one."""
    has_developer = any(message["role"] == "developer" for message in messages)
    has_parts = any(isinstance(message.get("content"), (list, tuple)) for message in messages)
    has_calls = any(message.get("tool_calls") for message in messages)
    has_nulls = any(value is None for message in messages for value in message.values())
    knows_developer = "developer" in source
    yield from (
        Form(developer, parts, arguments, nulls, empty)
        for nulls, empty in (ABSENCES if has_nulls else ABSENCES[:1])
        for parts in ((True, False) if has_parts else (True,))
        for arguments in ((True, False) if has_calls else (True,))
        for developer in (
            (True, False) if has_developer and knows_developer else (not has_developer,)
        )
    )


def _other_arguments(call: Any) -> Any:
    """Return the tool call with its arguments as a dict instead of a JSON text, or the other way round."""
    if not isinstance(call, Mapping):
        return call
    changed = dict(call)
    if isinstance(call.get("function"), Mapping):
        changed["function"] = _other_arguments(call["function"])
    arguments = call.get("arguments")
    if isinstance(arguments, Mapping):
        changed["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return changed
        changed["arguments"] = parsed if isinstance(parsed, dict) else arguments
    return changed


@dataclass(slots=True)
class Marker:
    """Marks the origin of what a caller brings, and counts it.

    `watched` are the values that a template should not print in Python's notation: lists of parts, and arguments of
    tool calls that are JSON texts.
    """

    num_items: int = 0
    num_characters: int = 0
    watched: list[Any] = field(default_factory=list)

    def marked(self, value: Any) -> Any:
        """Return a copy of the value, with every text in it marked as a message's."""
        self.num_items += 1
        if isinstance(value, str):
            self.num_characters += len(value)
            return all_message(str.__str__(value))  # `str()` of an enum is its name
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            return {self._marked_key(key): self.marked(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.marked(item) for item in value]
        raise TemplateError(
            f"a message, tool or template argument holds a {type(value).__name__}: use texts, numbers, "
            "lists and dicts, as JSON has them"
        )

    def message(self, message: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Return a message, marked but for a role that the template, with this source, may have in its markers."""
        marked: dict[str, Any] = self.marked(message)
        role = str.__str__(message["role"])
        if is_templates_own(role, source):
            marked["role"] = role
        if isinstance(marked.get("content"), list):
            self.watched.append(marked["content"])
        for call in marked.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str):
                self.watched.append(arguments)
        return marked

    def allowance(self, num_messages: int) -> Allowance:
        """Return what a template may do with all that was marked."""
        return Allowance(num_messages, self.num_items, self.num_characters)

    def _marked_key(self, key: Any) -> Any:
        if key is None or isinstance(key, (str, bool, int, float)):
            return all_message(str.__str__(key)) if isinstance(key, str) else key
        raise TemplateError(
            f"a message, tool or template argument has a {type(key).__name__} as a key: use texts, as JSON does"
        )

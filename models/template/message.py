"""Message: one turn of a chat, and the check of its role and content."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lowtide.models.errors import TemplateError

Message: TypeAlias = Mapping[str, Any]
"""One turn: "role", and "content": a text, or a list of parts such as {"type": "text", "text": "Hi"}.

An assistant's turn may have "tool_calls", as OpenAI's API writes them, and no content. Other keys go to the template
as they are."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_WORD = re.compile(r"[A-Za-z][\w -]*")


def checked_message(message: Message, known: str = "", *, any_role: bool = False) -> dict[str, Any]:
    """Return the message as a plain dict; raise `TemplateError` where its role or content is not valid.

    A role that is not in `ROLES` is valid where `known`, the template's source, names it, or with `any_role`.
    """
    if not isinstance(message, Mapping):
        raise TemplateError(
            f"a message is a {type(message).__name__}: write it as a dict with a role and a content"
        )
    role, content = message.get("role"), message.get("content")
    is_role = isinstance(role, str) and (any_role or role in ROLES or _is_named(role, known))
    calls = role == "assistant" and bool(message.get("tool_calls"))
    if not is_role or not (isinstance(content, (str, list, tuple)) or (content is None and calls)):
        raise TemplateError(
            f"a message has the role {role!r} and {type(content).__name__} content; the role must be one of "
            f"{', '.join(ROLES)} and the content a string or a list of text parts"
        )
    if isinstance(content, (list, tuple)):
        _check_parts(content)
    return {str(key): value for key, value in message.items()}


def _is_named(role: str, source: str) -> bool:
    return _WORD.fullmatch(role) is not None and any(
        f"{quote}{role}{quote}" in source for quote in "'\""
    )


def is_templates_own(role: str, source: str) -> bool:
    """Whether a role may be a part of the template's markers, as in `'<|' + message.role + '|>'`.

    So it is for the roles that everyone has, and for one that the template compares the role of a message with.
    """
    compared = rf"role(?:['\"]\])?\s*==\s*(['\"]){re.escape(role)}\1"
    return role in ROLES or re.search(compared, source) is not None


def _check_parts(parts: Sequence[Any]) -> None:
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise TemplateError(
                f"a message's content has a part of the type {kind!r}, but lowtide reads text alone: use parts "
                'such as {"type": "text", "text": "Hi"}'
            )

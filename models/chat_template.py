"""ChatTemplate: messages to the prompt text that a model was trained on.

Knows no tokens. A template comes with the model, so it is somebody else's code: it runs in
`template_sandbox`, which bounds what it may touch and how much it may make.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from lowtide.models.errors import TemplateError

if TYPE_CHECKING:
    import jinja2

Message: TypeAlias = Mapping[str, str]
"""One turn: "role" ("system", "user" or "assistant") and "content"."""

ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """A compiled chat template.

    Raises `TemplateError` where `source` is None or no template at all.
    """

    def __init__(self, source: str | None, special_texts: Mapping[str, str]) -> None:
        if source is None:
            raise TemplateError(
                "the model has no chat template, chatting needs one: use `lowtide run --raw` or "
                "Runtime.generate, or an instruction-tuned model"
            )
        self._special_texts = dict(special_texts)
        self._template = _compile(source)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that asks for the next assistant turn.

        Raises `TemplateError` with the template's own words where it refuses the messages.
        """
        from lowtide.models.template_sandbox import rendered

        return rendered(
            self._template,
            messages=[checked_message(message) for message in messages],
            add_generation_prompt=True,
            **self._special_texts,
        )


def checked_message(message: Message) -> dict[str, str]:
    """Return the message as a plain dict; raise `TemplateError` where it is not one."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or not isinstance(content, str):
        raise TemplateError(
            f"a message has the role {role!r} and {type(content).__name__} content: a role of "
            f"{', '.join(ROLES)} and a text are wanted"
        )
    return {"role": role, "content": content}


def _compile(source: str) -> jinja2.Template:
    from lowtide.models.template_sandbox import compiled

    return compiled(
        source,
        functions={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        tojson=_to_json,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(f"the chat template refuses these messages: {message}")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

"""ChatTemplate: messages to the prompt text that a model was trained on.

A template comes with the model, so it is untrusted code: it runs in `models/template_sandbox.py`, which limits
what it may reach and how much it may make.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from lowtide.models.errors import TemplateError
from lowtide.models.prompt_span import PromptSpan

if TYPE_CHECKING:
    import jinja2

Message: TypeAlias = Mapping[str, str]
"""One turn: "role" ("system", "user" or "assistant") and "content"."""

ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """A compiled chat template.

    Raises `TemplateError` where `source` is None or does not parse.
    """

    def __init__(self, source: str | None, special_texts: Mapping[str, str]) -> None:
        if source is None:
            raise TemplateError(
                "the model has no chat template: use `lowtide run --raw` or Runtime.generate, or an "
                "instruction-tuned model"
            )
        self._special_texts = dict(special_texts)
        self._template = _compile(source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> list[PromptSpan]:
        """Return the prompt for the next assistant turn.

        `tools` are the JSON schemas of functions that the model may call, and `arguments` further variables of the
        template, by name. Raises `TemplateError` with the template's own message where it refuses the messages.
        """
        from lowtide.models.template_sandbox import rendered

        text = rendered(
            self._template,
            messages=[checked_message(message) for message in messages],
            tools=tools,
            add_generation_prompt=True,
            **{**self._special_texts, **(arguments or {})},
        )
        return [PromptSpan(text, from_message=False)]


def checked_message(message: Message) -> dict[str, str]:
    """Return the message as a plain dict; raise `TemplateError` where its role or content is not valid."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or not isinstance(content, str):
        raise TemplateError(
            f"a message has the role {role!r} and {type(content).__name__} content; the role must be one of "
            f"{', '.join(ROLES)} and the content a string"
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

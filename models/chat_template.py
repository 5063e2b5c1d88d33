"""ChatTemplate: messages to the prompt text that a model was trained on.

A template comes with the model, so it is untrusted code: it runs in `models/template/sandbox.py`, which limits what
it may reach and how much it may make, and which traces what a message brought. It renders what transformers'
`apply_chat_template` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadOption, TemplateError
from lowtide.models.template.message import ROLES, Message, checked_message
from lowtide.models.text.prompt_span import PromptSpan

if TYPE_CHECKING:
    import jinja2

    from lowtide.models.template.conversation import Form

__all__ = ["ROLES", "ChatTemplate", "Message", "checked_message", "template_source"]


def template_source(template: str | Path) -> str:
    """Return the source of a template of the caller's: a text, or a `Path` of a file in UTF-8.

    Raises `BadOption` where the file cannot be read.
    """
    if isinstance(template, str):
        return template
    try:
        return template.expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 at byte {error.start}: convert it"
    except ValueError:  # a path with a NUL
        reason = "is no path of a file"
    raise BadOption(f"{option('chat_template')} is {shown(str(template))}, which {reason}")


class ChatTemplate:
    """A compiled chat template.

    Raises `TemplateError` where `source` is None or does not parse.
    """

    def __init__(self, source: str | None, special_texts: Mapping[str, str]) -> None:
        if source is None:
            raise TemplateError(
                "the model has no chat template, and its vocabulary has the markers of no known family: state one with "
                f"{option('chat_template')}, use `lowtide run --raw` or Runtime.generate, or an instruction-tuned "
                "model"
            )
        self._source = source
        self._special_texts = dict(special_texts)
        self._template = _compile(source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        generation_prompt: bool = True,
    ) -> list[PromptSpan]:
        """Return the prompt for the next assistant turn; neighbouring spans are of different kinds.

        `tools` are the JSON schemas of functions that the model may call, and `arguments` further variables of the
        template, by name. `generation_prompt` begins the next turn of the assistant. What a caller brings is a
        message's text, in whatever way the template changes it. Raises `TemplateError` with the template's own message
        where it refuses the messages, and `BadOption` where an argument has the name of something that lowtide states.

        Templates differ in the form that they expect of content parts, of arguments of tool calls, and of the role
        "developer". Where the template fails with the form that is given, or prints it in Python's notation, the
        other one is rendered.
        """
        from lowtide.models.template.conversation import forms_of

        self._check_arguments(arguments)
        _check_tools(tools)
        checked = [checked_message(message, self._source) for message in messages]
        failures: list[TemplateError] = []
        poor: list[list[PromptSpan]] = []
        for form in forms_of(checked, self._source):
            try:
                variables = {**(arguments or {}), "add_generation_prompt": generation_prompt}
                spans, misused = self._rendered(form, checked, tools, variables)
            except TemplateError as error:
                failures.append(error)
                continue
            if not misused:
                return spans
            poor.append(spans)
        if poor:
            return poor[0]
        raise failures[0]

    def _rendered(
        self,
        form: Form,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> tuple[list[PromptSpan], bool]:
        from lowtide.models.template.conversation import Marker
        from lowtide.models.template.sandbox import rendered

        marker = Marker()
        variables = {
            "documents": None,
            **self._special_texts,
            "messages": [
                marker.message(form.applied(message), self._source) for message in messages
            ],
            "tools": marker.marked(list(tools)) if tools else None,
            **{name: marker.marked(value) for name, value in arguments.items()},
        }
        return rendered(self._template, variables, marker.allowance(len(messages)), marker.watched)

    def _check_arguments(self, arguments: object) -> None:
        from lowtide.models.template.conversation import OWN_VARIABLES

        if arguments is None:
            return
        if not isinstance(arguments, Mapping) or not all(
            isinstance(name, str) for name in arguments
        ):
            raise BadOption(
                f"template_arguments is {shown(arguments)}; it must be a dict of variables by name"
            )
        taken = sorted({*OWN_VARIABLES, *self._special_texts} & set(arguments))
        if taken:
            raise BadOption(
                f"the template argument {taken[0]} is stated by lowtide itself: leave it out"
            )


def _check_tools(tools: Any) -> None:
    if tools is None:
        return
    is_list = isinstance(tools, Sequence) and not isinstance(tools, str | bytes)
    if not is_list or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadOption(f"tools is {shown(tools)}; it must be a list of dicts, each a JSON schema")


def _compile(source: str) -> jinja2.Template:
    from lowtide.models.template.sandbox import compiled

    return compiled(source, {"raise_exception": _raise_exception, "strftime_now": _strftime_now})


def _raise_exception(message: str) -> None:
    raise TemplateError(f"the chat template refuses these messages: {message}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)

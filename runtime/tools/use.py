"""ToolUse: what a chat with tools needs: its messages, its grammar, and the reader of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowtide.models.arguments.values import shown
from lowtide.models.chat_template import Message
from lowtide.models.errors import BadOption
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.structured.formats import JsonSchema
from lowtide.runtime.tools.format import CallGrammar
from lowtide.runtime.tools.generic import with_tools
from lowtide.runtime.tools.grammar import CallSyntax
from lowtide.runtime.tools.reader import CallReader
from lowtide.runtime.tools.tool import Tool, tools_of

CHOICES = ("auto", "none", "required")


class ToolUse:
    """The tools of one answer in a model's call format.

    `choice` is "auto", "none", "required", or the name of the tool that must be called. `several` allows more than
    one call. Raises `BadOption` for tools that cannot be used.
    """

    def __init__(
        self,
        syntax: CallSyntax,
        tools: Sequence[Any],
        choice: str = "auto",
        *,
        several: bool = True,
    ) -> None:
        self._syntax = syntax
        self.tools = tools_of(tools)
        self.choice = choice
        self.several = several
        self._callable = self._chosen()

    def _chosen(self) -> list[Tool]:
        """Return the tools that the answer may call."""
        if self.choice == "none":
            return []
        if self.choice in CHOICES:
            return self.tools
        chosen = [tool for tool in self.tools if tool.name == self.choice]
        if not chosen:
            names = ", ".join(tool.name for tool in self.tools) or "none"
            raise BadOption(
                f"tool_choice is {shown(self.choice)}, which is no tool; it must be auto, none, required, or one of "
                f"the tools ({names})"
            )
        return chosen

    @property
    def is_required(self) -> bool:
        """Whether the answer must be a call."""
        return bool(self._callable) and self.choice != "auto"

    def messages(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages for the chat template."""
        if not self._syntax.form.is_generic:
            return messages
        return with_tools(messages, self._callable, self._syntax.form)

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        """The tools for the chat template; None where it knows none."""
        if self._syntax.form.is_generic:
            return None
        return [tool.to_dict() for tool in self._callable] or None

    def params(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters with the grammar of an answer that may call.

        A JSON schema that they have is that of answers that call nothing.
        """
        if not self._callable:
            return params
        schema = None
        if params.constraint is not None:
            if not isinstance(params.constraint, JsonSchema):
                raise BadOption(
                    "tools and a constraint that is no JSON schema exclude each other: leave one of them out"
                )
            schema = params.constraint.parse(params.constraint.schema)
        grammar = CallGrammar(
            self._syntax,
            self._callable,
            required=self.is_required,
            several=self.several,
            text_schema=schema,
        )
        return replace(params, constraint=grammar)

    def reader(self) -> CallReader | None:
        """Return the reader of an answer; None where it calls nothing."""
        if not self._callable:
            return None
        return CallReader(self._syntax, [tool.name for tool in self._callable])

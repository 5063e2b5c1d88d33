"""CallGrammar: the format of an answer that may call tools, with advice how to end it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from lowtide.models.errors import BadOption
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.formats import Grammar, JsonSchema
from lowtide.runtime.structured.grammar.advice import START, Advice, JsonAdvice, JsonPlace
from lowtide.runtime.structured.vocabulary import TokenVocabulary
from lowtide.runtime.tools.grammar import CallSyntax, closed_schema, tool_grammar
from lowtide.runtime.tools.tool import Tool


class CallGrammar(Grammar):
    """Free text and calls of `tools` in a model's syntax; `text_schema` is that of answers that call nothing."""

    def __init__(
        self,
        syntax: CallSyntax,
        tools: Sequence[Tool],
        *,
        required: bool,
        several: bool,
        text_schema: Any = None,
    ) -> None:
        source = tool_grammar(
            syntax, tools, required=required, several=several, text_schema=text_schema
        )
        super().__init__(source)
        object.__setattr__(self, "_tools", tuple(tools))
        object.__setattr__(self, "_call_advice", _CallAdvice(syntax, tools, text_schema))

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer; raises `BadOption` with the name of a tool that cannot be used."""
        try:
            return super().compile(vocabulary)
        except BadOption:
            tools: tuple[Tool, ...] = getattr(self, "_tools", ())
            for tool in tools:
                try:
                    JsonSchema(closed_schema(tool.parameters)).compile(vocabulary)
                except BadOption as error:
                    raise BadOption(f"the parameters of the tool {tool.name}: {error}") from None
            raise

    def _advice(self) -> Advice:
        advice: Advice = getattr(self, "_call_advice", super()._advice())
        return advice


class _CallAdvice(Advice):
    """Where arguments are written, what their schemas say; in other text nothing is known."""

    def __init__(self, syntax: CallSyntax, tools: Sequence[Tool], text_schema: Any) -> None:
        self._starts = [
            (json.dumps(tool.name)[1:-1] + _visible(syntax, syntax.form.middle)).encode()
            for tool in tools
        ]
        self._of_tools = [JsonAdvice(tool.parameters) for tool in tools]
        self._of_text = None if text_schema is None else JsonAdvice(text_schema)

    def texts(self, written: bytes, place: JsonPlace) -> Iterator[bytes]:
        """Yield ways to end the arguments, or the JSON of an answer that calls nothing."""
        found = [written.rfind(start) for start in self._starts]
        last = max(range(len(found)), key=found.__getitem__)
        if found[last] >= 0:
            arguments = written[found[last] + len(self._starts[last]) :]
            yield from self._of_tools[last].texts(arguments, START.after(arguments))
        elif self._of_text is not None:
            yield from self._of_text.texts(written, place)


def _visible(syntax: CallSyntax, text: str) -> str:
    """Return a text as the bytes of its tokens spell it: control tokens have none."""
    for marker in syntax.control:
        text = text.replace(marker, "")
    return text

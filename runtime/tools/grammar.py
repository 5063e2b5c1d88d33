"""The grammar of an answer that may call tools: free text, then calls in the model's own format.

Where calls are required, the answer is calls alone. Otherwise it is free until the text that begins a call. From
there on the names are those of tools, and the arguments follow their schemas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowtide.models.errors import BadOption
from lowtide.models.template.call_format import (
    ID,
    REASONING_END,
    REASONING_START,
    CallFormat,
)
from lowtide.models.text.tokenizer import Tokenizer
from lowtide.runtime.structured.grammar.enforceable import enforceable
from lowtide.runtime.tools.tool import Tool

MAX_CALLS = 8
"""Most calls of one answer."""
_MARKER = re.compile(r"<[^<>\s]{1,40}>|\[[A-Z_]{2,40}\]")
_JSON_OPTIONS: dict[str, dict[str, Any]] = {
    "pretty": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "compact": {"whitespace_flexible": False},
}
_FLEXIBLE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,8}"}


@dataclass(frozen=True)
class CallSyntax:
    """A call format with a model's vocabulary: which of its markers are control tokens (`control`, by text)."""

    form: CallFormat
    control: Mapping[str, int]

    @classmethod
    def of(cls, form: CallFormat, tokenizer: Tokenizer) -> CallSyntax:
        """Look the markers up; what comes behind a token that ends the answer is none of the answer's."""
        control, suffix = dict[str, int](), form.suffix
        texts = (form.prefix, form.middle, form.suffix, form.between or "", REASONING_END)
        for marker in {found for text in texts for found in _MARKER.findall(text)}:
            token_ids = tokenizer.encode(marker, add_special=False, parse_special=True)
            if len(token_ids) != 1:
                continue
            if tokenizer.is_end(token_ids[0]):
                suffix = suffix.partition(marker)[0]
            elif not tokenizer.token_bytes(token_ids[0]):
                control[marker] = token_ids[0]
        return cls(replace(form, suffix=suffix), control)

    def literal(self, text: str) -> str:
        """Return a text in Lark: quoted, with its control tokens by id, and any id of a call."""
        parts = re.split("|".join(map(re.escape, (*self.control, ID))), text)
        between = re.findall("|".join(map(re.escape, (*self.control, ID))), text)
        written = []
        for part, marker in zip(parts, [*between, None], strict=True):
            if part:
                written.append(json.dumps(part, ensure_ascii=False))
            if marker == ID:
                written.append(f"/[A-Za-z0-9]{{{self.form.id_length}}}/")
            elif marker is not None:
                written.append(f"<[{self.control[marker]}]>")
        return " ".join(written)


def tool_grammar(
    syntax: CallSyntax,
    tools: Sequence[Tool],
    *,
    required: bool,
    several: bool,
    text_schema: Any = None,
) -> str:
    """Return the grammar in Lark.

    With `several` an answer may have more than one call, where the format has them. `text_schema` is the JSON schema of
    answers that call nothing; None for any text.
    """
    form = syntax.form
    rules = [
        "%llguidance {}",
        f"start: {_start(form, required=required)}",
        f"calls: call{_repeated(form, several)} {syntax.literal(form.suffix)}".rstrip(),
        "call: " + " | ".join(f"call_{i}" for i in range(len(tools))),
    ]
    for i, tool in enumerate(tools):
        rules.append(f"call_{i}: {syntax.literal(tool.name + form.middle)} arguments_{i}")
        rules.append(f"arguments_{i}: %json {json.dumps(_arguments_schema(tool, form.style))}")
    if form.between is not None:
        rules.append(f"between: {syntax.literal(form.between)}")
    if required:
        rules += [f"called: {syntax.literal(form.prefix)} calls", *_reasoning(syntax)]
    else:
        rules += _free(syntax, text_schema)
    return "\n".join(rules) + "\n"


def _start(form: CallFormat, *, required: bool) -> str:
    if not required:
        return "called | free"
    return (
        "reasoning called"
        if form.reasoning == "open"
        else ("reasoning? called" if form.reasoning else "called")
    )


def _repeated(form: CallFormat, several: bool) -> str:
    return f" (between call){{0,{MAX_CALLS - 1}}}" if several and form.between is not None else ""


def _reasoning(syntax: CallSyntax) -> list[str]:
    """Return the rule of what comes before calls that are required."""
    form = syntax.form
    if not form.reasoning:
        return []
    start = "" if form.reasoning == "open" else syntax.literal(REASONING_START) + " "
    if REASONING_END in syntax.control:
        return [
            f"reasoning: {start}ANY <[{syntax.control[REASONING_END]}]> /\\s*/",
            r"ANY: /(.|\n)*/",
        ]
    end = json.dumps(REASONING_END)
    return [f"reasoning: {start}thought /\\s*/", f"thought[lazy]: ANY {end}", r"ANY: /(.|\n)*/"]


def _free(syntax: CallSyntax, text_schema: Any) -> list[str]:
    """Return the rules of free text, and of free text up to a call."""
    form, trigger = syntax.form, syntax.form.trigger
    first = next((marker for marker in syntax.control if trigger.startswith(marker)), None)
    if text_schema is not None:  # an answer is JSON or calls, so no text comes before a call
        return [
            f"called: {syntax.literal(form.prefix)} calls",
            f"free: %json {json.dumps({**text_schema, 'x-guidance': _FLEXIBLE})}",
        ]
    free = "free: TEXT"
    if first is not None:  # a control token is no text: nothing else can begin a call
        rest = syntax.literal(trigger[len(first) :] + form.behind_trigger)
        return [
            f"called: ANY <[{syntax.control[first]}]> {rest} calls",
            free,
            r"ANY: /(.|\n)*/",
            r"TEXT: /(.|\n)*/",
        ]
    if not trigger:
        start = _pattern(form.prefix)
        return [
            f"called: {syntax.literal(form.prefix)} calls",
            free,
            rf"TEXT: /(.|\n)*/ & ~/{start}(.|\n)*/",
        ]
    return [
        f"called: head {syntax.literal(form.behind_trigger)} calls",
        f"head[lazy]: ANY {json.dumps(trigger, ensure_ascii=False)}",
        free,
        r"ANY: /(.|\n)*/",
        rf"TEXT: /(.|\n)*/ & ~/(.|\n)*{_pattern(trigger)}(.|\n)*/",
    ]


def _pattern(text: str) -> str:
    """Return a text as a regular expression of Lark."""
    return re.sub(r"([][\\/.*+?(){}|^$&~-])", r"\\\1", text).replace("\n", r"\n")


def _arguments_schema(tool: Tool, style: str) -> dict[str, Any]:
    try:
        closed = closed_schema(tool.parameters)
    except RecursionError:
        raise BadOption(
            f"the parameters of the tool {tool.name} are nested too deeply: flatten them"
        ) from None
    return {**enforceable(closed), "x-guidance": _JSON_OPTIONS.get(style, _FLEXIBLE)}


def closed_schema(schema: Any) -> Any:
    """Return a schema whose objects have no properties that it does not name, unless it says that they may."""
    if isinstance(schema, list):
        return [closed_schema(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    changed = {
        key: value
        if key in ("enum", "const", "default", "examples")
        else {name: closed_schema(one) for name, one in value.items()}
        if key in ("properties", "$defs", "definitions") and isinstance(value, Mapping)
        else closed_schema(value)
        for key, value in schema.items()
    }
    if "properties" in changed and "additionalProperties" not in changed:
        combined = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties"} & set(changed)
        if not combined:
            changed["additionalProperties"] = False
    return changed

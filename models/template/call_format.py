"""CallFormat: how a chat template writes calls of tools, found by rendering calls and cutting out what changes.

Two names and several arguments are rendered. What stays the same around them is the format; it is taken only where it
writes other calls exactly. No list of model families is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import TemplateError
from lowtide.models.text.prompt_span import text_of

ID_LENGTHS = (9, 24)
"""Lengths of the ids of calls that are tried: some templates refuse any other than theirs."""
STYLES: dict[str, dict[str, Any]] = {
    "pretty": {"ensure_ascii": False},
    "compact": {"ensure_ascii": False, "separators": (",", ":")},
    "indented": {"ensure_ascii": False, "indent": 4},
    "indented by 2": {"ensure_ascii": False, "indent": 2},
}
"""How the arguments are written as JSON: the keywords of `json.dumps`."""
_NAMES = ("zzfirst", "yysecond")
_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"qqa": "vvone", "qqb": 7},
    {"qqa": "wwtwo", "qqb": 31},
    {"qqa": "uuthree"},
)
_QUESTION = {"role": "user", "content": "Hello."}
_CONTENT = "zzcontent"


@dataclass(frozen=True, slots=True)
class CallFormat:
    """The texts around the parts of calls, in the order `prefix`, name, `middle`, arguments, `suffix`.

    `between` stands between two calls instead of a suffix and a prefix; None where an answer has one call. `style` is
    that of the arguments' JSON. The texts may have `ID`, for the id of the call, which has `id_length` characters; 0
    where any id will do. `reasoning` says whether reasoning comes before the answer: "open" where the prompt begins it,
    "optional" where the model may, "" for none; `REASONING_END` ends it. `is_generic` is True where the template writes
    no calls, and the format is lowtide's own.
    """

    prefix: str
    middle: str
    suffix: str
    between: str | None
    style: str = "pretty"
    id_length: int = 0
    reasoning: str = ""
    is_generic: bool = False

    @property
    def trigger(self) -> str:
        """The text that begins a call inside other text; "" where a call can only begin an answer."""
        return _before_json(self.prefix).strip()

    @property
    def behind_trigger(self) -> str:
        """The rest of the prefix."""
        return self.prefix.partition(self.trigger)[2] if self.trigger else self.prefix

    def shown(self) -> str:
        """Return two calls, as a person reads the format."""
        call = f"{self.prefix}NAME{self.middle}{{...}}"
        if self.between is None:
            return call + self.suffix
        return f"{call}{self.between}NAME{self.middle}{{...}}{self.suffix}"


ID = "\ue000"
"""Stands for the id of a call in the texts of a format."""
REASONING_START, REASONING_END = "<think>", "</think>"
GENERIC = CallFormat(
    prefix='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    suffix="}\n</tool_call>",
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    is_generic=True,
)
"""What models are asked to write whose template knows no calls: the form of Hermes and Qwen, which many have seen."""


def call_format(template: ChatTemplate) -> CallFormat:
    """Return the format of the template's calls; `GENERIC` where it writes none, or in no form that is known here."""
    for as_text in (False, True):
        for content in (None, ""):
            for id_length in ID_LENGTHS:
                inversion = _Inversion(template, as_text, content, id_length)
                found = inversion.format()
                if found is not None:
                    return found
                if (
                    inversion.writes_calls
                ):  # in a form of its own: text in its place would be no arguments
                    return GENERIC
    return GENERIC


@dataclass(frozen=True, slots=True)
class _Inversion:
    """One way to state calls: arguments as JSON text or object, a content, and ids of some length."""

    template: ChatTemplate
    as_text: bool
    content: str | None
    id_length: int

    @property
    def writes_calls(self) -> bool:
        """Whether the template writes calls that are stated in this way."""
        return _NAMES[0] in (self._answer([(_NAMES[0], _ARGUMENTS[0])]) or "")

    def format(self) -> CallFormat | None:
        one = self._answer([(_NAMES[0], _ARGUMENTS[0])])
        if one is None or _NAMES[0] not in one:
            return None
        for style, found in self._cut(one):
            if self._writes(found, _NAMES[1], _ARGUMENTS[1]) and self._writes(
                found, _NAMES[0], _ARGUMENTS[2]
            ):
                return self._complete(found, style)
        return None

    def _cut(self, answer: str) -> Iterator[tuple[str, CallFormat]]:
        for style, keywords in STYLES.items():
            before, written, behind = answer.partition(json.dumps(_ARGUMENTS[0], **keywords))
            prefix, name, middle = before.partition(_NAMES[0])
            if written and name and prefix.strip():
                yield style, CallFormat(prefix, middle, behind, None, style)

    def _writes(self, form: CallFormat, name: str, arguments: Mapping[str, Any]) -> bool:
        """Whether the format writes another call as the template does."""
        written = json.dumps(arguments, **STYLES[form.style])
        expected = form.prefix + name + form.middle + written + form.suffix
        return self._answer([(name, arguments)]) == expected

    def _complete(self, form: CallFormat, style: str) -> CallFormat:
        """Return the format without what ends every answer, with what is between two calls."""
        head, ending = self._around_plain_answers()
        suffix = form.suffix.removesuffix(ending) if ending else form.suffix
        between = self._between(form)
        prefix = form.prefix[len(head) :] if form.prefix.startswith(head) else form.prefix
        texts = [prefix, form.middle, suffix, between or ""]
        shows_id = any(self._id(0) in text for text in texts)
        prefix, middle, suffix, between_text = (text.replace(self._id(0), ID) for text in texts)
        return CallFormat(
            prefix,
            middle,
            suffix,
            None if between is None else between_text.replace(self._id(1), ID),
            style,
            self.id_length if shows_id else 0,
            self._reasoning(head),
        )

    def _between(self, form: CallFormat) -> str | None:
        first, second = (json.dumps(one, **STYLES[form.style]) for one in _ARGUMENTS[:2])
        two = self._answer([(_NAMES[0], _ARGUMENTS[0]), (_NAMES[1], _ARGUMENTS[1])])
        start = form.prefix + _NAMES[0] + form.middle + first
        if two is None or not two.startswith(start):
            return None
        between, name, rest = two[len(start) :].partition(_NAMES[1])
        suffix = form.suffix.replace(self._id(0), self._id(1))
        return between if name and rest == form.middle + second + suffix else None

    def _around_plain_answers(self) -> tuple[str, str]:
        """Return what the template writes before and behind an answer that calls nothing."""
        plain = self._behind_prompt([{"role": "assistant", "content": _CONTENT}])
        if plain is None:
            return "", ""
        head, _, ending = plain.partition(_CONTENT)
        return head, ending

    def _reasoning(self, head: str) -> str:
        prompt = self._rendered([], generation_prompt=True) or ""
        _, begins, rest = prompt.rpartition(REASONING_START)
        if begins and REASONING_END not in rest:
            return "open"
        return "optional" if REASONING_END in head or begins else ""

    def _answer(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
        """Return what the template writes for an answer with these calls; None where it refuses them."""
        message = {
            "role": "assistant",
            "content": self.content,
            "tool_calls": [
                {
                    "id": self._id(number),
                    "type": "function",
                    "function": {
                        "name": name,
                        "arguments": json.dumps(arguments) if self.as_text else dict(arguments),
                    },
                }
                for number, (name, arguments) in enumerate(calls)
            ],
        }
        return self._behind_prompt([message])

    def _behind_prompt(self, answers: list[dict[str, Any]]) -> str | None:
        """Return what the template writes of answers where the prompt for them ends, or where it goes on otherwise."""
        whole = self._rendered(answers)
        prompt = self._rendered([], generation_prompt=True)
        if whole is None or prompt is None:
            return None
        common = _common_start(whole, prompt)
        # Both may go on with a marker that begins alike, such as <think> and <tool_call>.
        if len(common) < len(prompt):
            start = max(common.rfind("<"), common.rfind("["))
            if start >= 0 and not {">", "]"} & set(common[start:]):
                common = common[:start]
        return whole[len(common) :]

    def _rendered(
        self, answers: list[dict[str, Any]], *, generation_prompt: bool = False
    ) -> str | None:
        try:
            return text_of(
                self.template.render(
                    [_QUESTION, *answers],
                    tools=[_tool(name) for name in _NAMES],
                    generation_prompt=generation_prompt,
                )
            )
        except TemplateError:
            return None

    def _id(self, number: int) -> str:
        return f"c{number}" + "x" * (self.id_length - 2)


def _common_start(left: str, right: str) -> str:
    """Return the longest common beginning of two texts."""
    length = min(len(left), len(right))
    return left[: next((i for i in range(length) if left[i] != right[i]), length)]


def _tool(name: str) -> dict[str, Any]:
    properties = {"qqa": {"type": "string"}, "qqb": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["qqa"]}
    return {
        "type": "function",
        "function": {"name": name, "description": "d", "parameters": parameters},
    }


def _before_json(text: str) -> str:
    """Return the part of a prefix before its JSON begins, or what differs from call to call."""
    ends = [at for at in (text.find("{"), text.find("[{"), text.find(ID)) if at >= 0]
    return text[: min(ends)] if ends else text

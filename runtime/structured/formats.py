"""What an answer must look like: a JSON schema, any JSON object, a regular expression, a grammar, or choices."""

from __future__ import annotations

import dataclasses
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.util import find_spec
from typing import Any, get_origin

from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import choice, shown, text
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.extent.bytes import STATE_BYTES
from lowtide.runtime.structured.extent.extent import Extent, Part
from lowtide.runtime.structured.extent.grammar_extent import grammar_extent
from lowtide.runtime.structured.extent.pattern_extent import pattern_extent
from lowtide.runtime.structured.extent.schema_extent import schema_extent
from lowtide.runtime.structured.grammar.advice import NONE_KNOWN, Advice, JsonAdvice, WholeText
from lowtide.runtime.structured.grammar.enforceable import enforceable
from lowtide.runtime.structured.grammar.library import llguidance
from lowtide.runtime.structured.grammar.llguidance_constraint import (
    GrammarConstraint,
    GrammarError,
    GrammarTokenizer,
    grammar_from,
)
from lowtide.runtime.structured.python_types import NotReadable, PythonType
from lowtide.runtime.structured.rules.networks.network import OneOf
from lowtide.runtime.structured.rules.networks.network_rule import NetworkRule
from lowtide.runtime.structured.rules.rule_constraint import RuleConstraint
from lowtide.runtime.structured.schema import parse_schema, refused_keyword
from lowtide.runtime.structured.verified.attempts import Attempt
from lowtide.runtime.structured.verified.validator import Validator
from lowtide.runtime.structured.vocabulary import TokenVocabulary

MAX_SOURCE_BYTES = 128 * 1024
"""Most bytes of a schema, a regular expression or a grammar. Larger ones take seconds and tens of megabytes."""
STYLES = ("flexible", "compact", "pretty")
CHECKS = ("exact", "verified")
_STYLE_OPTIONS: dict[str, dict[str, Any]] = {
    "flexible": {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,8}"},
    "compact": {"whitespace_flexible": False},
    "pretty": {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
    },
}


class OutputFormat(ABC):
    """What an answer must look like, of any model. A format of your own implements `compile`."""

    @property
    def says_end(self) -> bool:
        """Whether the format says where an answer ends, so that stop texts cannot."""
        return True

    @property
    def needs_grammar(self) -> bool:
        """Whether llguidance is needed, and its memory, which is planned as "structured output"."""
        return True

    @property
    def num_bytes(self) -> int:
        """Bytes that the format holds beside the vocabulary and a grammar, planned with them."""
        return 0

    @abstractmethod
    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer; raises `BadOption` where it cannot be enforced."""

    def parse(self, answer: str) -> Any:
        """Return the value that a complete answer stands for."""
        return answer

    def reasoning(self, before: str) -> str:
        """Return the reasoning of the text that comes before the answer, without its markers."""
        return before

    @property
    def grammar_bytes(self) -> int:
        """Bytes that its grammar takes; raises `BadOption` where it is too large."""
        return 0


class _Grammar(OutputFormat):
    """A format that llguidance reads."""

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer."""
        try:
            return self._constraint(vocabulary, self._grammar())
        except GrammarError as error:
            raise BadOption(self._refusal(str(error))) from None

    def _constraint(self, vocabulary: TokenVocabulary, grammar: str) -> Constraint:
        """Return the constraint of a grammar; raises `GrammarError` where it cannot be used."""
        self.extent.check()
        tokenizer = vocabulary.cached(GrammarTokenizer)
        matcher = tokenizer.matcher(grammar)
        return GrammarConstraint(tokenizer, matcher, self._advice(), extent=self.extent)

    @property
    def grammar_bytes(self) -> int:
        """Bytes that its grammar takes; raises `BadOption` where it is too large."""
        self.extent.check()
        return self.extent.num_bytes

    @abstractmethod
    def _grammar(self) -> str:
        """Return the grammar as llguidance takes it."""

    @cached_property
    def extent(self) -> Extent:
        """How large the grammar becomes, and its shortest answer."""
        return self._extent()

    @abstractmethod
    def _extent(self) -> Extent:
        """Find that out."""

    def _advice(self) -> Advice:
        """Return what is known of the ends of answers beside the grammar."""
        return NONE_KNOWN

    @abstractmethod
    def _refusal(self, reason: str) -> str:
        """Return the sentence for a grammar that cannot be used."""


@dataclasses.dataclass(frozen=True)
class JsonSchema(_Grammar):
    """JSON that follows a schema: a dict, its text, or a type of Python (a dataclass, a TypedDict, a pydantic model).

    `style` is the white space between values: "flexible" allows up to 8 characters, "pretty" one blank after each
    comma and colon (as `json.dumps` writes it), "compact" none. `check` is "exact", which refuses a schema with a
    keyword that no grammar has, or "verified": then the grammar leaves that keyword out, the complete answer is
    validated, and a wrong one is tried again.
    """

    schema: Any
    style: str = "flexible"
    check: str = "exact"

    def __post_init__(self) -> None:
        if isinstance(self.schema, str):
            _check_size(self.schema)
        parsed, read = _schema_of(self.schema)
        object.__setattr__(self, "schema", json.dumps(parsed))
        object.__setattr__(self, "_read", read)
        choice(option("json_style"), self.style, STYLES)
        choice(option("schema_check"), self.check, CHECKS)
        _check_size(self.schema)

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer."""
        if self.check == "exact":
            return super().compile(vocabulary)
        try:
            return super().compile(vocabulary)
        except BadOption as exact:
            try:
                wider = self._constraint(
                    vocabulary, self._grammar(lenient=True, coerce_one_of=True)
                )
            except GrammarError:
                raise exact from None
        validator = Validator(json.loads(self.schema))
        return Attempt(wider, validator.violation, vocabulary.bytes_of)

    def _grammar(self, **options: Any) -> str:
        make, style = llguidance().LLMatcher.grammar_from_json_schema, _STYLE_OPTIONS[self.style]
        written = json.dumps(enforceable(json.loads(self.schema)))
        return grammar_from(make, written, overrides={**style, **options})

    def _extent(self) -> Extent:
        return schema_extent(json.loads(self.schema))

    def _advice(self) -> Advice:
        return JsonAdvice(json.loads(self.schema))

    def _refusal(self, reason: str) -> str:
        return refused_keyword(json.loads(self.schema), _first_line(reason))

    def parse(self, answer: str) -> Any:
        """Return the JSON value, or a value of the type that the schema came from."""
        read: Callable[[str], Any] = getattr(self, "_read", json.loads)
        return read(answer)


class JsonObject(JsonSchema):
    """Any JSON object."""

    def __init__(self, style: str = "flexible") -> None:
        super().__init__({"type": "object"}, style)


@dataclasses.dataclass(frozen=True)
class Regex(_Grammar):
    """A text that a regular expression matches as a whole; the syntax is that of Rust's regex crate."""

    pattern: Any

    def __post_init__(self) -> None:
        pattern = self.pattern
        if isinstance(pattern, re.Pattern):
            object.__setattr__(self, "pattern", pattern.pattern)
        _check_size(text(option("regex"), self.pattern, "a regular expression"))

    def _grammar(self) -> str:
        return grammar_from(llguidance().LLMatcher.grammar_from_regex, self.pattern)

    def _refusal(self, reason: str) -> str:
        return (
            f"{option('regex')} {shown(self.pattern)} is not a regular expression that can be enforced: "
            f"{_first_line(reason)}; correct it (the syntax is that of Rust's regex crate)"
        )

    def _extent(self) -> Extent:
        found = pattern_extent(self.pattern)
        size = Part(found.size, "the pattern")
        return Extent(Part(found.least, "the pattern"), size, STATE_BYTES * found.size)

    def _advice(self) -> Advice:
        return WholeText(self.pattern)


@dataclasses.dataclass(frozen=True)
class Grammar(_Grammar):
    """A context-free grammar: Lark as llguidance reads it, or GBNF as llama.cpp does (`root ::= ...`)."""

    grammar: str

    def __post_init__(self) -> None:
        _check_size(text(option("grammar"), self.grammar, "a grammar"))
        if not self.grammar.strip():
            raise BadOption(f"{option('grammar')} is empty; write a rule named start or root")

    def _grammar(self) -> str:
        return grammar_from(llguidance().LLMatcher.grammar_from_lark, self._lark)

    def _extent(self) -> Extent:
        return grammar_extent(self._lark)

    def _refusal(self, reason: str) -> str:
        return f"{option('grammar')} cannot be enforced: {_first_line(reason)}; correct it"

    @cached_property
    def _lark(self) -> str:
        is_gbnf = re.search(r"^\s*[\w-]+\s*::=", self.grammar, re.MULTILINE)
        return _lark_of(self.grammar) if is_gbnf else self.grammar


@dataclasses.dataclass(frozen=True)
class Choice(OutputFormat):
    """One of several texts. They are a sorted list and no grammar, which would take much longer for many."""

    choices: Any

    def __init__(self, *choices: Any) -> None:
        given = choices[0] if len(choices) == 1 and not isinstance(choices[0], str) else choices
        if not isinstance(given, (list, tuple, set, frozenset)):
            raise BadOption(f"{option('choice')} is {shown(given)}; pass a list of texts")
        found = tuple(text(option("choice"), one) for one in given)
        if not found or not all(found):
            raise BadOption(
                f"{option('choice')} is {shown(given)}; pass at least one text, none of them empty"
            )
        object.__setattr__(self, "choices", found)
        object.__setattr__(self, "_rule", NetworkRule(OneOf(one.encode() for one in found)))

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer."""
        return RuleConstraint(self._rule, vocabulary)  # type: ignore[attr-defined]

    @property
    def needs_grammar(self) -> bool:
        """No grammar is needed."""
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of the texts and of their order."""
        return int(self._rule.num_bytes)  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class OwnConstraint(OutputFormat):
    """A constraint that the caller wrote; each answer gets a copy."""

    constraint: Constraint

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return a copy of the constraint."""
        return self.constraint.fork()


def _schema_of(value: Any) -> tuple[Any, Callable[[str], Any]]:
    """Return the JSON schema of a value, and how to read an answer of that schema."""
    if isinstance(value, str):
        return parse_schema(value), json.loads
    if isinstance(value, (Mapping, bool)):
        try:
            return parse_schema(json.dumps(value)), json.loads
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, BadOption):
                raise
            raise BadOption(f"the JSON schema has a value that is not JSON: {error}") from None
    if isinstance(value, type) or get_origin(value) is not None:
        return schema_of_type(value)
    raise BadOption(f"the JSON schema is {shown(value)}; it must be a dict, its text, or a type")


def schema_of_type(value: Any) -> tuple[Any, Callable[[str], Any]]:
    """Return the JSON schema of a type, and how to read an answer of that schema.

    The types of Python are read here, and others with pydantic, where that is installed.
    """
    if not hasattr(value, "__pydantic_validator__"):
        try:
            found = PythonType(value)
            return found.schema, lambda answer: found.value(json.loads(answer))
        except NotReadable as error:
            reason = str(error)
    else:
        reason = "it is a class of pydantic"
    name = getattr(value, "__name__", str(value))
    if find_spec("pydantic") is None:
        raise BadOption(
            f"{name} has no JSON schema ({reason}): install pydantic, or pass a dataclass or a dict"
        )
    from pydantic import TypeAdapter

    try:
        adapter: Any = TypeAdapter(value)
        return adapter.json_schema(), adapter.validate_json
    except Exception as error:  # pydantic has several, and a class may raise its own
        raise BadOption(
            f"{name} has no JSON schema ({_first_line(str(error))}): pass a dataclass, a pydantic model or a dict"
        ) from None


_GBNF_TOKEN = re.compile(
    r"""(?P<end>[}*+?])(?P<space>(?:\s|\#[^\n]*)*)\)|\{\s*(?=,)|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\#[^\n]*"""
)


def _plainer(found: re.Match[str]) -> str:
    """Return a part of a GBNF grammar as the converter reads it.

    It loses the parentheses around a single repeated item, so that `("a"{2}){3}` has two counts in a row: the empty
    text behind the item keeps them. `{,3}` is `{0,3}`.
    """
    if found["end"]:
        return f'{found["end"]} ""{found["space"]})'
    return "{0" if found[0].startswith("{") else found[0]


def _lark_of(gbnf: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(_GBNF_TOKEN.sub(_plainer, gbnf)))
    except Exception as error:  # the converter raises what Python's own functions raise
        raise BadOption(
            f"the GBNF grammar cannot be read: {_first_line(str(error)) or type(error).__name__}; correct it"
        ) from None


def _check_size(source: str) -> None:
    num_bytes = len(source.encode("utf-8", errors="replace"))
    if num_bytes > MAX_SOURCE_BYTES:
        raise BadOption(
            f"{_name()} has {num_bytes:,} bytes, but at most {MAX_SOURCE_BYTES:,} can be used: shorten it"
        )


def _name() -> str:
    return "the schema, grammar or list of choices"


def _first_line(reason: str) -> str:
    """Return what a library says in one line; of a regular expression's error, the part that names it."""
    if "NoExtension" in reason:
        return "no text can follow it"
    lines = [" ".join(line.split()) for line in reason.strip().splitlines()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (named or lines or [""])[-1 if named else 0].rstrip(".;:")

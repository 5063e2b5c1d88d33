"""Rules as formats of answers: `Avoid`, `Must`, `Length`, and `AllOf`, which combines any formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import text, whole_number
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.formats import OutputFormat
from lowtide.runtime.structured.response_format import as_format
from lowtide.runtime.structured.rules.avoid import AvoidConstraint, AvoidRule
from lowtide.runtime.structured.rules.length import LengthRule
from lowtide.runtime.structured.rules.must import MustRule
from lowtide.runtime.structured.rules.product import Product
from lowtide.runtime.structured.rules.rule_constraint import RuleConstraint
from lowtide.runtime.structured.vocabulary import TokenVocabulary

MAX_MUST = 64
"""Most texts that an answer must have."""
MAX_LENGTH = 1_000_000


@dataclass(frozen=True, init=False)
class AllOf(OutputFormat):
    """Answers that follow several formats at once."""

    formats: tuple[OutputFormat, ...]

    def __init__(self, *formats: Any) -> None:
        found = tuple(as_format(one) for one in formats)
        object.__setattr__(self, "formats", tuple(one for one in found if one is not None))
        if not self.formats:
            raise BadOption("AllOf() has no format that asks for anything; pass at least one")

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer."""
        parts = [one.compile(vocabulary) for one in self.formats]
        return parts[0] if len(parts) == 1 else Product(parts)

    @property
    def says_end(self) -> bool:
        """Whether one of the formats says where the answer ends."""
        return any(one.says_end for one in self.formats)

    @property
    def needs_grammar(self) -> bool:
        """Whether one of the formats needs a grammar."""
        return any(one.needs_grammar for one in self.formats)

    @property
    def grammar_bytes(self) -> int:
        """Bytes of the grammars of all formats."""
        return sum(one.grammar_bytes for one in self.formats)

    @property
    def num_bytes(self) -> int:
        """Bytes of all formats."""
        return sum(one.num_bytes for one in self.formats)

    def parse(self, answer: str) -> Any:
        """Return the value that the first format whose value is not the text itself has for an answer."""
        for one in self.formats:
            value = one.parse(answer)
            if value != answer:
                return value
        return answer


@dataclass(frozen=True, init=False)
class Avoid(OutputFormat):
    """Answers in which none of the texts appears; upper and lower case differ."""

    texts: tuple[str, ...]

    def __init__(self, *texts: Any) -> None:
        object.__setattr__(self, "texts", _texts("avoid", texts))
        object.__setattr__(self, "_rule", AvoidRule([one.encode() for one in self.texts]))

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer."""
        return AvoidConstraint(self._rule, vocabulary)  # type: ignore[attr-defined]

    @property
    def says_end(self) -> bool:
        """An answer may end anywhere, so a stop text may end it."""
        return False

    @property
    def needs_grammar(self) -> bool:
        """No grammar is needed."""
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of the table that finds the texts."""
        return int(self._rule.num_bytes)  # type: ignore[attr-defined]


@dataclass(frozen=True, init=False)
class Must(OutputFormat):
    """Answers in which every one of the texts appears; upper and lower case differ."""

    texts: tuple[str, ...]

    def __init__(self, *texts: Any) -> None:
        found = _texts("must", texts)
        if len(found) > MAX_MUST:
            raise BadOption(
                f"{option('must')} has {len(found):,} texts, but at most {MAX_MUST} can be asked for: pass fewer"
            )
        object.__setattr__(self, "texts", found)
        object.__setattr__(self, "_rule", MustRule([one.encode() for one in found]))

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer."""
        return RuleConstraint(self._rule, vocabulary)  # type: ignore[attr-defined]

    @property
    def needs_grammar(self) -> bool:
        """No grammar is needed."""
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of the table that finds the texts."""
        return int(self._rule.num_bytes)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Length(OutputFormat):
    """Answers of so many characters (Unicode code points) and words (separated by white space); None is no limit."""

    min_characters: int = 0
    max_characters: int | None = None
    min_words: int = 0
    max_words: int | None = None

    def __post_init__(self) -> None:
        for unit in ("characters", "words"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            least = whole_number(option(f"min_{unit}"), least, 0, MAX_LENGTH)
            if most is not None:
                most = whole_number(option(f"max_{unit}"), most, 0, MAX_LENGTH)
                if most < least:
                    raise BadOption(
                        f"{option(f'max_{unit}')} is {most:,}, which is less than {option(f'min_{unit}')} "
                        f"{least:,}: raise it"
                    )
            object.__setattr__(self, f"min_{unit}", least)
            object.__setattr__(self, f"max_{unit}", most)
        if not self._rules():
            raise BadOption("Length() has no limit; pass max_words, for example")

    def _rules(self) -> list[LengthRule]:
        limits = {
            "characters": (self.min_characters, self.max_characters),
            "words": (self.min_words, self.max_words),
        }
        return [LengthRule(unit, *limit) for unit, limit in limits.items() if limit != (0, None)]

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer."""
        parts = [RuleConstraint(rule, vocabulary) for rule in self._rules()]
        return parts[0] if len(parts) == 1 else Product(parts)

    @property
    def needs_grammar(self) -> bool:
        """No grammar is needed."""
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of the tables that count."""
        return sum(rule.num_bytes for rule in self._rules())


def _texts(name: str, values: tuple[Any, ...]) -> tuple[str, ...]:
    """Return texts as they are, without doubles; raises `BadOption` for none and for empty ones."""
    if len(values) == 1 and isinstance(values[0], (list, tuple, set, frozenset)):
        values = tuple(values[0])
    found = tuple(dict.fromkeys(text(option(name), one) for one in values))
    if not found or not all(found):
        raise BadOption(
            f"{option(name)} has an empty text, or none at all: pass texts of a character or more"
        )
    return found

"""Networks as formats of answers: `Paths` of a knowledge graph, and `Ltl`, plans that satisfy a formula."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lowtide.models.arguments.names import option
from lowtide.models.arguments.values import text, whole_number
from lowtide.models.errors import BadOption
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.formats import OutputFormat
from lowtide.runtime.structured.rules.ltl.automaton import Automaton
from lowtide.runtime.structured.rules.ltl.formula import parse_formula
from lowtide.runtime.structured.rules.ltl.plans import Plans
from lowtide.runtime.structured.rules.networks.graph import Graph, read_triples
from lowtide.runtime.structured.rules.networks.network_rule import MarkedRule, NetworkRule
from lowtide.runtime.structured.rules.rule_constraint import RuleConstraint
from lowtide.runtime.structured.rules.text_rule import TextRule
from lowtide.runtime.structured.vocabulary import TokenVocabulary

MAX_HOPS = 100
MAX_ACTIONS = 10_000
ARROW = " \u2192 "
MARKERS = ("<PATH>", "</PATH>")


@dataclass(frozen=True, eq=False)
class _Ruled(OutputFormat):
    """A format of one rule, which all answers share."""

    rule: TextRule

    def compile(self, vocabulary: TokenVocabulary) -> Constraint:
        """Return the constraint of a new answer."""
        return RuleConstraint(self.rule, vocabulary)

    @property
    def needs_grammar(self) -> bool:
        """No grammar is needed."""
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of the rule."""
        return self.rule.num_bytes


class Paths(_Ruled):
    """Answers whose paths through a knowledge graph exist.

    `triples` are (head, relation, tail) names, or a text with one a line. Free text comes before, between and behind
    paths, each of which lies between `markers`; at least `least` of them. With `markers=None` the answer is one path.
    A path is `head → relation → tail → relation → ...` with up to `max_hops` relations, and begins at one of `starts`,
    or anywhere.
    """

    def __init__(
        self,
        triples: str | Iterable[Sequence[str]],
        *,
        max_hops: int = 2,
        starts: Sequence[str] = (),
        least: int = 0,
        markers: tuple[str, str] | None = MARKERS,
        arrow: str = ARROW,
    ) -> None:
        found = read_triples(triples) if isinstance(triples, str) else _checked(triples)
        hops = whole_number(option("path_hops"), max_hops, 1, MAX_HOPS)
        first, last = markers or ("", "")
        if markers is not None and not (first and last):
            raise BadOption(
                "a marker of paths is empty; pass two texts, or None for an answer of one path"
            )
        for name in {name for triple in found for name in triple}:
            wrong = next((one for one in (arrow, last) if one and one in name), None)
            if wrong is not None:
                raise BadOption(
                    f"the name {name[:60]!r} has {wrong!r} in it, which stands between or behind names: rename it"
                )
        graph = Graph(found, arrow=arrow, end=last, max_hops=hops, starts=starts)
        count = whole_number(option("paths_least"), least, 0, 1000)
        rule = MarkedRule(graph, first.encode(), count) if markers else NetworkRule(graph)
        super().__init__(rule)


class Ltl(_Ruled):
    """Plans that satisfy a formula of linear temporal logic on finite traces: `actions` with `separator` between them.

    For the formula's operators see `parse_formula`. An action that is no name is quoted in it.
    """

    def __init__(self, formula: str, actions: Sequence[str], *, separator: str = "\n") -> None:
        names = list(dict.fromkeys(text("an action", one) for one in actions))
        if not names or not all(names):
            raise BadOption(
                f"{option('ltl')} is a formula over actions, and there are none or an empty one: name them with "
                f"{option('actions')}"
            )
        if len(names) > MAX_ACTIONS:
            raise BadOption(f"{len(names):,} actions are more than {MAX_ACTIONS:,}: name fewer")
        for name in names:
            if not separator or separator in name:
                raise BadOption(
                    f"the action {name[:60]!r} has the separator {separator!r} in it: rename it"
                )
        parsed = parse_formula(text(option("ltl"), formula), names)
        plans = Plans(Automaton(parsed, len(names)), names, separator)
        super().__init__(NetworkRule(plans))


def _checked(triples: Iterable[Sequence[Any]]) -> list[tuple[str, str, str]]:
    found = []
    for triple in triples:
        names = list(triple)
        if len(names) != 3 or not all(isinstance(name, str) and name for name in names):
            raise BadOption(
                f"a triple is {triple!r}; it must have three texts: head, relation and tail"
            )
        found.append((names[0], names[1], names[2]))
    return found

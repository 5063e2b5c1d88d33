"""The automaton of a formula by progression (Bacchus and Kabanza, 1998): what must hold after each action.

A state is what the rest of the trace has to satisfy, as the smallest alternatives of obligations. Actions that the
formula does not name all lead to the same state.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable
from functools import reduce

from lowtide.models.errors import BadOption
from lowtide.runtime.structured.rules.ltl.formula import FALSE, GOES_ON, HAS_ENDED, TRUE, Formula

MAX_STATES = 1024
MAX_ALTERNATIVES = 128
"""Most alternatives of a state; a formula with more is refused before it takes seconds."""
Alternatives = frozenset[frozenset[Formula]]
_YES: Alternatives = frozenset([frozenset()])
_NO: Alternatives = frozenset()


class Automaton:
    """State 0 is the start. `next_state[state][kind]` follows an action of a kind; `kind_of` has each action's.

    `distance[state]` is how many actions a plan needs from a state, -1 where none satisfies the formula. Raises
    `BadOption` for a formula that needs too many states, and for one that no plan satisfies.
    """

    def __init__(self, formula: Formula, num_actions: int) -> None:
        named = sorted(_named(formula))
        others = [action for action in range(num_actions) if action not in named]
        self.kind_of = array("H", [len(named)] * num_actions)
        for kind, action in enumerate(named):
            self.kind_of[action] = kind
        samples = [*named, *others[:1]]
        states = [_obliged(formula)]
        number = {states[0]: 0}
        self.next_state: list[array[int]] = []
        num_alternatives = 0
        for state in states:  # grows while it is read
            row = array("H")
            for action in samples:
                behind = _progressed(state, action)
                if behind not in number:
                    num_alternatives += len(behind)
                    if len(states) == MAX_STATES or num_alternatives > 8 * MAX_STATES:
                        raise _too_large()
                    number[behind] = len(states)
                    states.append(behind)
                row.append(number[behind])
            self.next_state.append(row)
        self.is_accepting = [_holds_at_end(state) for state in states]
        self.distance = self._distances()
        if self.steps_from(0) < 0:
            raise BadOption("no list of the actions satisfies the formula: change one of them")

    def follow(self, state: int, action: int) -> int:
        """Return the state behind an action."""
        return self.next_state[state][self.kind_of[action]]

    def steps_from(self, state: int) -> int:
        """Return how many actions a plan needs that goes on behind a state; -1 for none."""
        found = [self.distance[behind] for behind in self.next_state[state]]
        return min((one + 1 for one in found if one >= 0), default=-1)

    def _distances(self) -> list[int]:
        before: list[list[int]] = [[] for _ in self.next_state]
        for state, row in enumerate(self.next_state):
            for behind in set(row):
                before[behind].append(state)
        distance = [0 if accepting else -1 for accepting in self.is_accepting]
        waiting = deque(state for state, accepting in enumerate(self.is_accepting) if accepting)
        while waiting:
            state = waiting.popleft()
            for earlier in before[state]:
                if distance[earlier] < 0:
                    distance[earlier] = distance[state] + 1
                    waiting.append(earlier)
        return distance

    @property
    def num_bytes(self) -> int:
        """Bytes of the table and the distances."""
        kinds = len(self.next_state[0])
        return len(self.next_state) * (2 * kinds + 96) + 2 * len(self.kind_of)


def _too_large() -> BadOption:
    return BadOption(
        f"the formula needs more than {MAX_STATES:,} states or {MAX_ALTERNATIVES} alternatives: make it simpler"
    )


def _named(formula: Formula) -> set[int]:
    own = {formula.action} if formula.action >= 0 else set[int]()
    return own.union(*map(_named, formula.parts))


def _smallest(alternatives: Iterable[frozenset[Formula]]) -> Alternatives:
    """Return the alternatives that contain no other one: the same condition has the same ones."""
    found = sorted(set(alternatives), key=len)
    if len(found) > 8 * MAX_ALTERNATIVES:
        raise _too_large()
    kept: list[frozenset[Formula]] = []
    for one in found:
        if not any(smaller <= one for smaller in kept):
            kept.append(one)
            if len(kept) > MAX_ALTERNATIVES:
                raise _too_large()
    return frozenset(kept)


def _both(left: Alternatives, right: Alternatives) -> Alternatives:
    if len(left) * len(right) > 16 * MAX_ALTERNATIVES:
        raise _too_large()
    return _smallest(one | other for one in left for other in right)


def _either(left: Alternatives, right: Alternatives) -> Alternatives:
    return _smallest(left | right)


def _obliged(formula: Formula) -> Alternatives:
    """Return a formula as alternatives of obligations, none of which is "and", "or", true or false."""
    if formula == TRUE:
        return _YES
    if formula == FALSE:
        return _NO
    if formula.operator in ("and", "or"):
        is_and = formula.operator == "and"
        found = _YES if is_and else _NO
        for part in formula.parts:
            found = _both(found, _obliged(part)) if is_and else _either(found, _obliged(part))
        return found
    return frozenset([frozenset([formula])])


def _progressed(state: Alternatives, action: int) -> Alternatives:
    """Return what must hold behind an action."""
    known: dict[Formula, Alternatives] = {}
    found = _NO
    for alternative in state:
        all_hold = _YES
        for formula in alternative:
            if formula not in known:
                known[formula] = _behind(formula, action)
            all_hold = _both(all_hold, known[formula])
        found = _either(found, all_hold)
    return found


def _behind(formula: Formula, action: int) -> Alternatives:
    """Return what must hold behind an action so that the formula holds at it."""
    parts, operator = formula.parts, formula.operator
    if operator in ("is", "is not"):
        return _YES if (formula.action == action) == (operator == "is") else _NO
    if operator == "next":
        return _both(_obliged(GOES_ON), _obliged(parts[0]))
    if operator == "weak next":
        return _either(_obliged(HAS_ENDED), _obliged(parts[0]))
    found = [_behind(part, action) for part in parts]
    if operator in ("and", "true"):
        return reduce(_both, found, _YES)
    if operator in ("or", "false"):
        return reduce(_either, found, _NO)
    again: Alternatives = frozenset([frozenset([formula])])
    left, right = found
    if operator == "until":
        return _either(right, _both(left, again))
    return _both(right, _either(left, again))


def _holds_at_end(state: Alternatives) -> bool:
    """Whether the trace may end: "weak next" and "release" hold where no step follows, the others do not."""
    return any(
        all(formula.operator in ("weak next", "release") for formula in alternative)
        for alternative in state
    )

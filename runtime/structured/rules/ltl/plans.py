"""Plans: lists of actions that satisfy a formula, as a network.

Safe plans for robots (Wu et al. 2024, arXiv 2409.19471) decode an action, then ask the automaton of the formula. Here
an action may begin only where a plan with it can still satisfy the formula, so nothing is decoded twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from lowtide.runtime.structured.rules.ltl.automaton import Automaton
from lowtide.runtime.structured.rules.networks.network import END, Network, Place, SortedTexts


class Plans(Network):
    """Actions with `separator` between them; at least one. A place is a state of the automaton."""

    start = 0

    def __init__(self, automaton: Automaton, actions: Sequence[str], separator: str) -> None:
        self._automaton = automaton
        self._actions = SortedTexts(action.encode() for action in actions)
        number = {action.encode(): i for i, action in enumerate(actions)}
        self._number = [number[action] for action in self._actions]
        self._separator = separator.encode()

    @cached_property
    def _possible(self) -> list[list[int]]:
        """For each state, the actions behind which a plan can go on or end, in the order of their bytes."""
        automaton = self._automaton
        return [
            [
                i
                for i, action in enumerate(self._number)
                if automaton.distance[automaton.follow(state, action)] >= 0
            ]
            for state in range(len(automaton.next_state))
        ]

    def range_of(self, place: int) -> tuple[int, int]:
        """Return the range of the actions that may come."""
        return 0, len(self._possible[place])

    def word(self, place: int, number: int) -> bytes:
        """Return an action."""
        return self._actions[self._possible[place][number]]

    def _follow(self, place: int, number: int) -> int:
        return self._automaton.follow(place, self._number[self._possible[place][number]])

    def behind(self, place: int, first: int, last: int) -> Sequence[tuple[bytes, Place]]:
        """Return whether the plan may end behind an action, and whether another one may follow."""
        state = self._follow(place, first)
        found: list[tuple[bytes, Place]] = [END] if self._automaton.is_accepting[state] else []
        if self._possible[state]:
            found.append((self._separator, state))
        return found

    def rest(self, place: int) -> bytes:
        """Return the fewest actions that satisfy what is left."""
        words = list[bytes]()
        while True:
            numbers = range(len(self._possible[place]))
            distance = self._automaton.distance
            number = min(numbers, key=lambda i, at=place: distance[self._follow(at, i)])  # type: ignore[misc]
            words.append(self.word(place, number))
            place = self._follow(place, number)
            if self._automaton.is_accepting[place]:
                return self._separator.join(words)

    @property
    def num_bytes(self) -> int:
        """Bytes of the automaton, the actions, and the lists of those that are possible."""
        num_possible = sum(map(len, self._possible))
        return (
            self._automaton.num_bytes
            + self._actions.num_bytes
            + 8 * num_possible
            + 64 * len(self._possible)
        )

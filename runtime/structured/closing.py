"""A short way from any point of an answer to its end, found by the constraint alone, without a model.

Limited-discrepancy search (Harvey and Ginsberg, 1995): in each state the candidates are ordered by how soon they tend
to end an answer. Ways that follow the order come first, then those that leave it once, and so on.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

MAX_BRANCHES = 48
"""Most candidates of one state."""


class State(Protocol):
    """What a search asks of a `Constraint`; its methods are described there."""

    def fork(self) -> State: ...  # noqa: D102

    def advance(self, token_id: int) -> None: ...  # noqa: D102

    def legal_ids(self) -> Any: ...  # noqa: D102

    def num_legal(self, token_ids: Sequence[int]) -> int: ...  # noqa: D102

    def forced(self) -> Sequence[int]: ...  # noqa: D102

    def likely_ends(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def is_accepting(self) -> bool: ...  # noqa: D102


_Way = Any
"""The way before the last step and the tokens of that step, None for the start: ways share their beginnings."""
SEARCHES = ((1 << 30, 64), (32, 100), (128, 200), (512, 600), (1 << 30, 1200))
"""Most tokens of a way, and most states that are looked at, search after search: a way that never ends would take
all states of a single one."""


def find_closing(constraint: State, max_tokens: int) -> tuple[int, ...] | None:
    """Return at most `max_tokens` tokens after which the answer may end; None where none are found.

    The constraint itself does not change.
    """
    if constraint.is_accepting:
        return ()
    for length, num_states in SEARCHES:
        found, is_complete = _search(constraint, min(length, max_tokens), num_states)
        if found is not None or is_complete:
            return found
    return None


def _search(
    constraint: State, max_tokens: int, num_states: int
) -> tuple[tuple[int, ...] | None, bool]:
    """Return the way that was found, and whether no longer one can exist.

    Waiting ways are tokens only: the state after them is made when their turn comes, so few states exist at once.
    """
    last: tuple[int, ...] = ()
    is_cut, state, counter = False, constraint.fork(), 0
    waiting: list[tuple[int, int, int, _Way]] = [(0, 0, 0, None)]
    for _ in range(num_states):
        if not waiting:
            return None, not is_cut
        discrepancy, negative_length, _, way = heapq.heappop(waiting)
        path = _path(way)
        if path[: len(last)] != last:
            last, state = (), constraint.fork()
        for token_id in path[len(last) :]:
            state.advance(token_id)
        last = path
        if state.is_accepting:
            return path, True
        for rank, steps in enumerate(_candidates(state)):
            length = len(steps) - negative_length
            if length > max_tokens:
                is_cut = True
                continue
            counter += 1
            entry = (discrepancy + rank.bit_length(), -length, counter, (way, steps))
            heapq.heappush(waiting, entry)
    return None, False


def _path(way: _Way) -> tuple[int, ...]:
    """Return the tokens of a way."""
    parts = []
    while way is not None:
        way, steps = way
        parts.append(steps)
    return tuple(token_id for steps in reversed(parts) for token_id in steps)


def _candidates(state: State) -> Iterator[tuple[int, ...]]:
    """Yield the tokens to try next, the most promising first; a forced text is the only candidate."""
    forced = tuple(state.forced())
    if forced and state.num_legal(forced) == len(forced):
        yield forced
        return
    legal = state.legal_ids()
    ends = np.asarray(state.likely_ends(), np.int32)
    places = np.minimum(legal.searchsorted(ends), max(len(legal) - 1, 0))
    tried = ends[legal[places] == ends].tolist() if len(legal) else []
    yield from ((token_id,) for token_id in tried[:MAX_BRANCHES])
    if len(tried) < MAX_BRANCHES // 4:
        known = set(tried)
        yield from ((i,) for i in legal[:MAX_BRANCHES].tolist() if i not in known)

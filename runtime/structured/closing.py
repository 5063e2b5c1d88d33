"""A short way from any point of an answer to its end, found by the constraint alone, without a model.

Each state has candidates, ordered by how soon they tend to end an answer. The greedy way takes the first legal one
again and again. Where it fails, limited-discrepancy search (Harvey and Ginsberg, 1995) follows ways that leave the
order once, then twice, and so on. All bounds are counts and not times, so the same answer always closes the same way.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

MAX_BRANCHES = 48
"""Most candidates of one state."""
MAX_REPEATED = 64
"""The greedy way fails where it takes the same single token so often in a row: such a way may never end."""
MAX_ADVANCES = 20_000
"""Most tokens that one search appends to states."""
NEAR_STEPS = 64
"""Most steps of the way that is looked for after every token where a longer way is known."""
GREEDY_STEPS, TRIED_TOKENS = 500, 1500
"""Most steps and tokens of the first greedy way. Where it is found but has too many tokens, few others are tried."""


class State(Protocol):
    """What a search asks of a `Constraint`; its methods are described there."""

    def fork(self) -> State: ...  # noqa: D102

    def advance(self, token_id: int) -> None: ...  # noqa: D102

    def legal_ids(self) -> Any: ...  # noqa: D102

    def num_legal(self, token_ids: Sequence[int]) -> int: ...  # noqa: D102

    def forced(self) -> Sequence[int]: ...  # noqa: D102

    def likely_next(self) -> Iterable[Sequence[int]]: ...  # noqa: D102

    @property
    def is_accepting(self) -> bool: ...  # noqa: D102


_Way = Any
"""The way before the last step and the tokens of that step, None for the start: ways share their beginnings."""
SEARCHES = ((32, 100), (128, 200), (512, 600))
"""Most tokens of a way, and most states that are looked at, search after search: a way that never ends would take
all states of a single one."""
MAX_STATES = 1200
"""Most states of the last search, whose ways have any length."""


def find_closing(constraint: State, max_tokens: int) -> tuple[int, ...] | None:
    """Return at most `max_tokens` tokens after which the answer may end; None where none are found.

    The constraint itself does not change.
    """
    if constraint.is_accepting:
        return ()
    found = _greedy(constraint, TRIED_TOKENS, GREEDY_STEPS)
    if found is not None and len(found) <= max_tokens:
        return found
    for length, num_states in SEARCHES if found is None else SEARCHES[:1]:
        found, is_complete = _search(constraint, min(length, max_tokens), num_states)
        if found is not None or is_complete:
            return found
    if found is None:
        found = _greedy(constraint, max_tokens, max_tokens)
        return found or _search(constraint, max_tokens, MAX_STATES)[0]
    return None


def find_closing_of_many(constraint: State, max_tokens: int) -> tuple[int, ...] | None:
    """Return a way to the end as `find_closing` does, in one small search: each state asks several constraints."""
    if constraint.is_accepting:
        return ()
    found = _greedy(constraint, min(TRIED_TOKENS, max_tokens), GREEDY_STEPS)
    return found or _search(constraint, min(NEAR_STEPS, max_tokens), SEARCHES[0][1])[0]


def find_greedy_closing(constraint: State) -> tuple[int, ...] | None:
    """Return the greedy way to the end; None where it fails. Others may be shorter, but finding them takes long."""
    return () if constraint.is_accepting else _greedy(constraint, TRIED_TOKENS, GREEDY_STEPS)


def find_near_closing(constraint: State, max_tokens: int) -> tuple[int, ...] | None:
    """Return the greedy way of few steps; None where it fails, which says nothing about others."""
    if constraint.is_accepting:
        return ()
    return _greedy(constraint, max_tokens, NEAR_STEPS)


def _greedy(constraint: State, max_tokens: int, max_steps: int) -> tuple[int, ...] | None:
    """Return the way that takes the first legal candidate of each state."""
    state, path, num_repeated = constraint.fork(), list[int](), 0
    for _ in range(max_steps):
        steps = next(_candidates(state), None)
        if steps is None or len(path) + len(steps) > max_tokens:
            return None
        num_repeated = num_repeated + 1 if [*steps] == path[-1:] else 0
        if num_repeated > MAX_REPEATED:
            return None
        for token_id in steps:
            state.advance(token_id)
        path += steps
        if state.is_accepting:
            return tuple(path)
    return None


def _search(
    constraint: State, max_tokens: int, num_states: int
) -> tuple[tuple[int, ...] | None, bool]:
    """Return the way that was found, and whether no longer one can exist.

    Waiting ways are tokens only: the state after them is made when their turn comes, so few states exist at once.
    """
    last: tuple[int, ...] = ()
    is_cut, state, counter, num_advances = False, constraint.fork(), 0, 0
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
        num_advances += len(path) - len(last)
        last = path
        if state.is_accepting:
            return path, True
        if num_advances > MAX_ADVANCES:
            return None, False
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
    """Yield the legal tokens to try next, the most promising first; a forced text is the only candidate."""
    forced = tuple(state.forced())
    if forced and state.num_legal(forced) == len(forced):
        yield forced
        return
    known: set[tuple[int, ...]] = set()
    for likely in state.likely_next():
        steps = tuple(likely)
        if steps not in known and state.num_legal(steps) == len(steps):
            known.add(steps)
            yield steps
            if len(known) == MAX_BRANCHES:
                return
    if len(known) < MAX_BRANCHES // 4:
        rest = ((token_id,) for token_id in state.legal_ids()[:MAX_BRANCHES].tolist())
        yield from (steps for steps in rest if steps not in known)

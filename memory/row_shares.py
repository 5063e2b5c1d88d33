"""RowShares: how many rows of a pass each sequence of a batch gets for what is drafted for it.

By arithmetic alone, as `speculation_plan` does it for one sequence. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush


@dataclass(frozen=True, slots=True)
class RowShares:
    """`num_drafted` tokens of each sequence are verified; `gain` is what that promises.

    `gain` is a multiple of the throughput of a pass without drafts: the most that any number of rows
    promises, also where that is too little to draft anything; None where there is nothing to share out.
    """

    num_drafted: tuple[int, ...]
    gain: float | None


def share_rows(
    acceptances: Sequence[Sequence[float]],
    cost: Callable[[int], float],
    *,
    most_rows: int,
    least_gain: float,
) -> RowShares:
    """Share out a pass of at most `most_rows` rows, of which each sequence has one in any case.

    `acceptances[i]` has, for each token that is proposed for sequence i, how often it comes where those
    before it came; `cost` returns the seconds of a pass by its rows. The next row goes to the token that is
    likeliest to come, and there are as many as promise the most tokens a second; none, where that is not
    `least_gain` times what a pass without drafts gives. No other choice of as many rows promises more: a
    later token of a sequence is never likelier than the one before.
    """
    num_sequences = len(acceptances)
    none = (0,) * num_sequences
    shares, expected = list(none), float(num_sequences)
    best: RowShares | None = None
    waiting = [(-acceptance[0], i) for i, acceptance in enumerate(acceptances) if acceptance]
    heapify(waiting)
    for num_rows in range(num_sequences + 1, most_rows + 1):
        if not waiting:
            break
        reached, i = heappop(waiting)
        expected -= reached
        shares[i] += 1
        if shares[i] < len(acceptances[i]):
            heappush(waiting, (reached * acceptances[i][shares[i]], i))
        gain = expected / num_sequences * cost(num_sequences) / cost(num_rows)
        if best is None or best.gain is None or gain > best.gain:
            best = RowShares(tuple(shares), gain)
    if best is None or best.gain is None:
        return RowShares(none, None)
    return best if best.gain > least_gain else RowShares(none, best.gain)

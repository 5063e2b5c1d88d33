"""Ladder: the candidates of a plan in one order, from the smallest to the preferred one.

The planner takes the highest rung that fits. More memory lets more rungs fit, so the highest one never falls; and
no rung has a shorter context, a worse KV type, fewer resident layers at the same context, a smaller verification
or a smaller batch than a rung below it. So nothing that was planned for shrinks when the budget grows.

What comes first is what costs the most time where it is missing:

1. A prompt that does not fit costs the whole answer: the context grows to the expected tokens, in the smallest
   KV type.
2. A worse KV type costs accuracy, up to 0.05 nats a token: the type improves to the preferred one.
3. The engine's own kernels cost a third of the speed of an answer, and three quarters of that of a prompt: lowtide's
   run, where the request leaves that open.
4. A short context costs a second reading of a text or a conversation, seconds each time: it grows to
   `USUAL_CONTEXT`.
5. Streamed weights and single tokens cost seconds at every token. Resident layers and speculation are weighed by the
   seconds a token that a byte of each saves: what saves more comes first (`speculation_first`).
6. A context beyond the usual one costs nothing until a conversation is that long: it grows to the model's own.
7. Small batches cost a few percent of the time of a prompt: they grow last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from lowtide.memory.plan.line import PlanCandidate
from lowtide.memory.plan.speculation.allocator import SpeculationChoice
from lowtide.models.spec import KV_PADDING

MIN_CONTEXT = 512
"""The shortest context that a plan chooses by itself, in tokens."""
USUAL_CONTEXT = 4096
"""Tokens that a plan makes room for before weights are resident, where nothing is known of the prompts."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Rungs `first` to `last`, of which each needs at least as much memory as the one before."""

    candidate_of: Callable[[int], PlanCandidate]
    first: int
    last: int

    def highest(self, fits: Callable[[PlanCandidate], bool]) -> PlanCandidate | None:
        """Return the highest rung that fits, by bisection; None where none does."""
        if not fits(self.candidate_of(self.first)):
            return None
        low, high = self.first, self.last + 1
        while high - low > 1:
            middle = (low + high) // 2
            if fits(self.candidate_of(middle)):
                low = middle
            else:
                high = middle
        return self.candidate_of(low)


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderBounds:
    """What the rungs range over, each from the smallest to the preferred.

    `stated_context` is the user's, None where the plan chooses it; with `kv_on_demand` the tokens that are planned
    for may be fewer. `longest` is the longest context, `expected` the tokens of a prompt and its answer, 0 where
    they are not known. `streams` says whether weights may be streamed. `speculations` begin with what the request
    needs at least, and each takes more and promises more than the one before; `streamed_speculations` are those
    where weights are streamed. With `optional_kernels`, lowtide's kernels may be left out.
    """

    longest: int
    stated_context: int | None
    expected: int
    kv_on_demand: bool
    kv_types: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    speculations: tuple[SpeculationChoice, ...]
    num_layers: int
    streams: bool
    streamed_speculations: tuple[SpeculationChoice, ...] = ()
    speculation_first: bool = True
    optional_kernels: bool = False

    @property
    def least(self) -> int:
        """The fewest tokens that are planned for."""
        return min(MIN_CONTEXT, self.longest)

    @property
    def needed(self) -> int:
        """The tokens that come before everything else."""
        padded = -(-self.expected // KV_PADDING) * KV_PADDING
        return min(max(padded, self.least), self.longest)

    @property
    def usual(self) -> int:
        """The tokens that come before resident weights."""
        if self.stated_context is not None:
            return self.longest
        return self.needed if self.expected else min(max(USUAL_CONTEXT, self.least), self.longest)


def _speculation(like: PlanCandidate, choices: tuple[SpeculationChoice, ...]) -> Stage:
    return Stage(lambda i: replace(like, speculation=choices[i]), 0, len(choices) - 1)


def _with_layers(like: PlanCandidate, num_layers: int) -> PlanCandidate:
    return replace(like, resident_layers=num_layers)


class Ladder:
    """The stages of a model and a request, from the smallest rung to the preferred one."""

    def __init__(self, bounds: LadderBounds) -> None:
        self._bounds = bounds
        self._stages = tuple(self._all_stages())

    @property
    def top(self) -> PlanCandidate:
        """The preferred rung."""
        last = self._stages[-1]
        return last.candidate_of(last.last)

    def highest(self, fits: Callable[[PlanCandidate], bool]) -> PlanCandidate | None:
        """Return the highest rung that fits; None where none does."""
        found = (stage.highest(fits) for stage in reversed(self._stages))
        return next((candidate for candidate in found if candidate is not None), None)

    def smallest(self, kv_type: str, resident_layers: int | None) -> PlanCandidate:
        """Return the candidate with the fewest tokens and these choices."""
        return replace(
            self._at(self._bounds.least), kv_type=kv_type, resident_layers=resident_layers
        )

    def _all_stages(self) -> Iterator[Stage]:
        bounds = self._bounds
        types, last_type = bounds.kv_types, len(bounds.kv_types) - 1
        needed, usual = self._at(bounds.needed), self._at(bounds.usual)
        yield self._tokens(bounds.least, bounds.needed, self._at(bounds.needed))
        yield Stage(lambda i: replace(needed, kv_type=types[i]), 0, last_type)
        usual = replace(usual, kv_type=types[-1])
        if bounds.optional_kernels:
            exact = replace(needed, kv_type=types[-1])
            yield Stage(lambda i: replace(exact, own_kernels=bool(i)), 0, 1)
            usual = replace(usual, own_kernels=True)
        yield self._tokens(bounds.needed, bounds.usual, usual)
        if bounds.streams:
            if bounds.speculation_first:
                yield _speculation(usual, bounds.streamed_speculations)
                usual = replace(usual, speculation=bounds.streamed_speculations[-1])
            yield Stage(partial(_with_layers, usual), 0, bounds.num_layers)
            usual = replace(usual, resident_layers=None)
        # Behind a rung with speculation, resident weights without it would be slower.
        only_last = bounds.streams and bounds.speculation_first
        speculations = bounds.speculations[-1:] if only_last else bounds.speculations
        yield _speculation(usual, speculations)
        usual = replace(usual, speculation=speculations[-1])
        yield self._tokens(bounds.usual, bounds.longest, usual)
        longest = self._placed(usual, bounds.longest)
        batches = bounds.batch_sizes
        yield Stage(lambda i: replace(longest, batch_size=batches[i]), 0, len(batches) - 1)

    def _tokens(self, first: int, last: int, like: PlanCandidate) -> Stage:
        """Return a stage of growing tokens, in steps of the cache's padding."""
        if self._bounds.stated_context is not None and not self._bounds.kv_on_demand:
            first = last  # all tokens are planned for, or none
        return Stage(
            lambda i: self._placed(like, min(max(i * KV_PADDING, first), last)),
            -(-first // KV_PADDING),
            -(-last // KV_PADDING),
        )

    def _at(self, tokens: int) -> PlanCandidate:
        """Return the smallest choices with so many tokens."""
        bounds = self._bounds
        smallest = PlanCandidate(
            context=tokens,
            batch_size=bounds.batch_sizes[0],
            kv_type=bounds.kv_types[0],
            kv_tokens=tokens,
            resident_layers=0 if bounds.streams else None,
            speculation=bounds.speculations[0],
        )
        return self._placed(smallest, tokens)

    def _placed(self, candidate: PlanCandidate, tokens: int) -> PlanCandidate:
        """Return the candidate with room for so many tokens; a stated context stays as it is."""
        stated = self._bounds.stated_context
        if stated is None:
            return replace(candidate, context=tokens, kv_tokens=tokens)
        num_planned = tokens if self._bounds.kv_on_demand else stated
        return replace(candidate, context=stated, kv_tokens=min(num_planned, stated))

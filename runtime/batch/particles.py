"""Particles in a batch: answers of one prompt that give their places to each other (sequential Monte Carlo, SMC).

The particles run in the decode loop like any batch. What they share, the prompt and the tokens before they part, lies
in the cache once: a particle that goes on from another one begins with its cells.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lowtide.models.text.tokenizer import TextStream, Tokenizer
from lowtide.runtime.errors import ConstraintFailed
from lowtide.runtime.generation.loop import DecodeLoop
from lowtide.runtime.generation.result import GenerationChunk
from lowtide.runtime.generation.state import GenerationRequest, GenerationState
from lowtide.runtime.options import SamplingParams
from lowtide.runtime.structured.aligned.particles import (
    ancestors,
    mean_log_weight,
    needs_resampling,
    normalised,
)

MakeState = Callable[[int, GenerationRequest], GenerationState]


@dataclass
class Particle:
    """An answer so far, and the state that continues it; `failure` is why it cannot go on."""

    state: GenerationState
    chunks: list[GenerationChunk] = field(default_factory=list)
    failure: Exception | None = None

    @property
    def log_weight(self) -> float:
        """The logarithm of the weight."""
        answer = self.state.answer
        return -math.inf if self.failure is not None or answer is None else answer.log_weight

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the answer."""
        return [chunk.token_id for chunk in self.chunks if chunk.token_id is not None]

    @property
    def is_running(self) -> bool:
        """Whether another token may come."""
        return self.failure is None and not (self.chunks and self.chunks[-1].finish_reason)


class ParticleFilter:
    """Runs the requests, all of which have one prompt, as particles in `loop`; `make` makes the state of a key."""

    def __init__(
        self,
        loop: DecodeLoop,
        make: MakeState,
        requests: Sequence[GenerationRequest],
        seed: int | None,
    ) -> None:
        self._loop, self._make = loop, make
        self._requests = requests
        self._chooser = random.Random(seed)
        self._keys = 0
        # Particles with one seed would all draw the same tokens.
        self._particles = [
            Particle(self._added(replace(one, params=self._reseeded(one.params))))
            for one in requests
        ]

    def _reseeded(self, params: SamplingParams) -> SamplingParams:
        return replace(params, seed=self._chooser.getrandbits(48))

    def _added(self, request: GenerationRequest) -> GenerationState:
        self._keys += 1
        state = self._make(self._keys, request)
        self._loop.add(state)
        return state

    def run(self, tokenizer: Tokenizer) -> Iterator[tuple[int, GenerationChunk]]:
        """Yield the chunks of all answers when they have ended, as pairs of the particle's number and the chunk.

        Raises what ended the particles where none is left.
        """
        while not self._loop.is_idle:
            by_key = {one.state.key: one for one in self._particles}
            for key, outcome in self._loop.step():
                particle = by_key[key]
                if isinstance(outcome, Exception):
                    if not isinstance(outcome, ConstraintFailed):
                        raise outcome
                    particle.failure = outcome
                else:
                    particle.chunks.append(outcome)
            weights = [one.log_weight for one in self._particles]
            have_begun = all(one.chunks or not one.is_running for one in self._particles)
            if have_begun and needs_resampling(weights):
                self._resample(weights)
        weights = [one.log_weight for one in self._particles]
        if not normalised(weights):
            raise self._particles[0].failure or ConstraintFailed("no particle is left")
        if -math.inf in weights:  # a failed one has no answer
            self._resample(weights)
            weights = [one.log_weight for one in self._particles]
        shares = normalised(weights)
        for number, (particle, share) in enumerate(zip(self._particles, shares, strict=True)):
            for chunk in self._told(particle, share, tokenizer):
                yield number, chunk

    def _resample(self, weights: Sequence[float]) -> None:
        """Let particles go on from others; all have the mean weight then."""
        mean = mean_log_weight(weights)
        sources = ancestors(weights, self._chooser)
        kept = [(one.state, list(one.chunks), one.is_running) for one in self._particles]
        for number, source in enumerate(sources):
            particle = self._particles[number]
            if source != number:
                if particle.is_running:
                    self._loop.remove(particle.state.key)
                state, chunks, is_running = kept[source]
                particle.chunks, particle.failure = list(chunks), None
                particle.state = (
                    self._continued(state, particle) if is_running else self._copied(state)
                )
            answer = particle.state.answer
            assert answer is not None, "particles have a constraint"
            answer.log_weight = mean

    def _copied(self, state: GenerationState) -> GenerationState:
        """Return a state that has ended, with an answer of its own."""
        self._keys += 1
        answer = None if state.answer is None else state.answer.fork()
        return self._make(self._keys, replace(state.request, answer=answer))

    def _continued(self, state: GenerationState, particle: Particle) -> GenerationState:
        """Add a state that goes on from another one: its prompt has the answer so far, whose cells it shares."""
        first = self._requests[0]
        written = particle.token_ids
        most = first.params.max_tokens
        left = None if most is None else most - len(written)
        answer = None if state.answer is None else state.answer.fork()
        params = replace(self._reseeded(first.params), max_tokens=left)
        return self._added(
            replace(first, token_ids=[*first.token_ids, *written], params=params, answer=answer)
        )

    def _told(
        self, particle: Particle, share: float, tokenizer: Tokenizer
    ) -> Iterator[GenerationChunk]:
        """Yield the chunks with the text of the whole answer, and the statistics of the whole at the end."""
        stream, first = TextStream(tokenizer), self._requests[0]
        for chunk in particle.chunks:
            text = "" if chunk.token_id is None else stream.push(chunk.token_id)
            stats = chunk.stats
            if chunk.finish_reason is not None:
                stats = replace(
                    stats,
                    prompt_tokens=len(first.token_ids) + first.dropped_tokens,
                    generated_tokens=len(particle.token_ids),
                    structured={**(stats.structured or {}), "weight": share},
                )
            yield replace(chunk, text=text, stats=stats)

"""The answers to one prompt: one as it comes, or several, one after the other or as particles of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lowtide import GenerationChunk, GenerationResult, Runtime, SamplingParams

MAX_ANSWERS = 1000
Show = Callable[[str], None]


def require_answers(number: int, params: SamplingParams, *, raw: bool) -> None:
    """Raise `UsageError` where so many answers cannot be drawn."""
    if number == 1:
        return
    if params.temperature == 0:
        raise click.UsageError(
            "--answers draws at random, and --temp is 0: raise it, or leave one of them out"
        )
    if params.sampling == "awrs" and params.constraint is None:
        raise click.UsageError(
            "--sampling awrs draws under a constraint: add one, such as --regex, or leave it out"
        )
    if params.sampling == "awrs" and not raw:
        raise click.UsageError(
            "--sampling awrs draws --answers as particles, which continue a text: add --raw, or use asap"
        )


def answers_of(
    runtime: Runtime,
    prompt: str | Sequence[Any],
    number: int,
    params: SamplingParams,
    arguments: Mapping[str, Any],
    show: Show | None,
) -> list[GenerationResult]:
    """Return the answers to a text, which is continued, or to messages; `show` gets their text as it comes."""
    from lowtide import GenerationResult

    if number > 1 and params.sampling == "awrs" and isinstance(prompt, str):
        results = runtime.generate_batch([prompt] * number, params)
        if show is not None:
            show("\n".join(one.text for one in results))
        return results
    results = []
    for i in range(number):
        seeded = params if params.seed is None else replace(params, seed=params.seed + i)
        chunks = (
            runtime.stream(prompt, params=seeded)
            if isinstance(prompt, str)
            else runtime.chat(prompt, params=seeded, template_arguments=arguments)
        )
        if show is not None and i:
            show("\n")
        shown = chunks if show is None else _shown(chunks, show)
        results.append(GenerationResult.of(shown, params.constraint))
    return results


def _shown(chunks: Iterator[GenerationChunk], show: Show) -> Iterator[GenerationChunk]:
    for chunk in chunks:
        if chunk.text:
            show(chunk.text)
        yield chunk


def answers_values(results: Sequence[GenerationResult]) -> dict[str, Any]:
    """Return what the JSON says of several answers."""
    if len(results) == 1:
        return {}
    return {
        "answers": [
            {
                "text": one.text,
                "tokens": list(one.token_ids),
                "finish_reason": one.finish_reason,
                "structured": one.structured,
            }
            for one in results
        ]
    }
